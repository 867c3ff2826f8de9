"""What the front process loads. (Its way to the replicas is exercised over HTTP in tests/pipelines/test_serve.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_front_process_needs_no_torch() -> None:
    """It starts fast and stays small; the same holds for parsing a body."""
    code = (
        "import sys\n"
        "import pipelines.serving.gateway\n"
        "from pipelines.serving.dialects.body import parse_body\n"
        "from pipelines.serving.dialects.chat import ChatBody\n"
        'parse_body(ChatBody, b\'{"messages": [{"role": "user", "content": "x"}], "remasking": "random"}\')\n'
        "print(sorted({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
