import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.tokenizer import (
    MASK,
    SPECIAL_TOKENS,
    TemplateRefusalError,
    _with_short_runs,
    declare_mask,
    encode_texts,
    ensure_special_tokens,
    has_tokenizer,
    load_tokenizer,
    render_chat,
    render_exchange,
    save_tokenizer,
    train_tokenizer,
    unknown_token_id,
    vocab_size,
)

TEXTS = ["the cat sat on the mat\n", "das Wetter ist schön, 天气很好 🙂\n", "def f(x):\n    return x\n"] * 20
# As LLaDA's folder has it: the open assistant header always follows, and the flag is not looked at.
OFFICIAL_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


UNKNOWN = "<unk>"
PROSE = [
    "the cat sat on the mat. ",
    "is this it?  no\n\n    x = 1\n",
    "Grüße, 天气很好\n",
    "one two  three\t4\n",
] * 20
METASPACE = "▁"
_LLAMA = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
_GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# {kind: (model, its trainer, normalizer, pre-tokenizer)}
KINDS = {
    "byte-level": (models.BPE, trainers.BpeTrainer, normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte-level with a prefix space": (models.BPE, trainers.BpeTrainer, None, pre_tokenizers.ByteLevel()),
    "byte-level as GPT-4": (
        models.BPE,
        trainers.BpeTrainer,
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_GPT4), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ),
    "metaspace first": (models.BPE, trainers.BpeTrainer, None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace always": (models.BPE, trainers.BpeTrainer, None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace never": (models.BPE, trainers.BpeTrainer, None, pre_tokenizers.Metaspace(prepend_scheme="never")),
    "unsplit metaspace": (
        models.BPE,
        trainers.BpeTrainer,
        None,
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    ),
    "legacy Llama": (models.BPE, trainers.BpeTrainer, _LLAMA, None),
    "unigram": (
        models.Unigram,
        trainers.UnigramTrainer,
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
    ),
    "unigram always": (models.Unigram, trainers.UnigramTrainer, normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "word pieces": (models.WordPiece, trainers.WordPieceTrainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "words": (models.WordLevel, trainers.WordLevelTrainer, normalizers.Lowercase(), pre_tokenizers.Whitespace()),
}  # fmt: skip


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    model, trainer, normalizer, pre_tokenizer = KINDS[kind]
    backend = Tokenizer(model() if model in (models.Unigram, models.BPE) else model(unk_token=UNKNOWN))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    special = [AddedToken(name, special=True, normalized=False) for name in (UNKNOWN, *SPECIAL_TOKENS)]
    options = {"unk_token": UNKNOWN} if model is models.Unigram else {}
    if isinstance(pre_tokenizer, (pre_tokenizers.ByteLevel, pre_tokenizers.Sequence)):
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        PROSE, trainer(vocab_size=330, special_tokens=special, show_progress=False, **options)
    )
    return ensure_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def published(shared_dir: Path) -> dict:
    return json.loads(
        (shared_dir / "data/tokenizers/llada_8b_special_tokens/special_tokens.json").read_text()
    )


def test_special_tokens_have_the_first_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (1, 2)


def test_training_is_deterministic_and_stays_within_the_size(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 400
    with pytest.raises(UserError, match="at least 262"):
        train_tokenizer(TEXTS, 100)


@pytest.mark.parametrize(
    "text", ["", " two  spaces ", "naïve 日本 🙂\x07", "<|mdm_mask|> and <|endoftext|>", "a\r\n\tb"]
)
def test_text_survives_and_never_becomes_a_special_token(tokenizer, text):
    ids = encode_texts(tokenizer, [text])[0]
    assert tokenizer.decode(ids) == text
    assert all(token >= len(SPECIAL_TOKENS) for token in ids)


def test_long_texts_are_encoded_in_pieces_without_a_difference(tokenizer, monkeypatch):
    text = "the cat  sat\n\non the mat\n" * 200
    whole = encode_texts(tokenizer, [text, "cat"])
    monkeypatch.setattr("llada.tokenizer._PIECE_CHARS", 50)
    assert encode_texts(tokenizer, [text, "cat"]) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole_text(kind, monkeypatch):
    monkeypatch.setattr("llada.tokenizer._PIECE_CHARS", 60)
    texts = ["".join(PROSE), " ".join(PROSE), "\n".join("ab" * 3 for _ in range(200)), "x" * 500]
    texts += ["the cat \n " * 50, "  ".join(PROSE), "\n " * 200, "天气" * 200]
    tokenizer = tokenizer_of(kind)
    whole = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert encode_texts(tokenizer, texts) == whole


@pytest.mark.parametrize("template", ["{0}{1}", "<|eot_id|>{0}<|eot_id|> {1}", "{0}\n\n<|eot_id|>{1}"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_ids_of_its_rendered_text(kind, template):
    tokenizer = tokenizer_of(kind)
    pieces = template.format("{{ messages[0].content }}", "{{ messages[-1].content }}")
    tokenizer.chat_template = pieces + "<|start_header_id|>assistant<|end_header_id|>\n"
    for first in ("the cat", " the cat ", "\n no", "    x = 1\n"):
        messages = [{"role": "user", "content": first}, {"role": "user", "content": "is this it?"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert render_chat(tokenizer, messages) == prompt
        for answer in ("the mat", "on  it.\nno", "    x = 1"):
            ids, written = render_exchange(tokenizer, messages, {"role": "assistant", "content": answer})
            end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
            assert (ids, written[-1]) == (prompt, end)
            whole = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
            if whole[: len(prompt)] == prompt:
                assert written[:-1] == whole[len(prompt) :]
            else:  # the line's end and the indentation would be one token, of which the prompt cannot hold half
                assert answer.startswith(" ")
                assert kind != "metaspace first"
                assert tokenizer.decode(written[:-1]).strip() == answer.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_finds_a_special_token_in_a_text(kind):
    tokenizer = tokenizer_of(kind)
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    text = f"the {MASK} cat<|endoftext|>"
    assert not special & set(encode_texts(tokenizer, [text])[0])
    tokenizer.chat_template = "{{ messages[0].content }}<|eot_id|>"
    ids = render_chat(tokenizer, [{"role": "user", "content": text}])
    assert special & set(ids) == {ids[-1]}


def test_a_folder_that_cuts_and_pads_does_neither_to_texts(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.backend_tokenizer.enable_padding(length=64)
    assert encode_texts(loaded, ["the cat sat on the mat"]) == encode_texts(
        tokenizer, ["the cat sat on the mat"]
    )


def test_tokens_added_later_count(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    encode_texts(loaded, ["the cat"])
    loaded.add_tokens(["catsat"])
    assert encode_texts(loaded, ["catsat"]) == [[loaded.convert_tokens_to_ids("catsat")]]


def test_the_id_of_unknown_text(tokenizer):
    assert unknown_token_id(tokenizer) is None
    assert unknown_token_id(tokenizer_of("word pieces")) == 0
    assert unknown_token_id(tokenizer_of("unigram")) == 0
    assert encode_texts(tokenizer_of("words"), ["zebra"]) == [[0]]


@pytest.mark.parametrize("signs", ["abcdefghijklmnopqrstuvwxyz", "0123456789", "!#$%&()*+", " \t"])
def test_a_run_without_a_break_does_not_stall_the_training(signs):
    run = "".join(signs[(i * i + i // 7) % len(signs)] for i in range(1_000_000))
    tokenizer = train_tokenizer(["the cat sat on the mat " * 50, run], 600)
    assert tokenizer.decode(encode_texts(tokenizer, [run[:3000]])[0]) == run[:3000]


def test_runs_that_are_words_are_trained_on_whole():
    texts = [" ".join(["a" * 999, "b" * 1000, "天" * 1000 + "。" + "气" * 1000, "1" * 1000 + "x"]), *TEXTS]
    pieces = list(_with_short_runs(texts))
    assert pieces == texts
    assert list(_with_short_runs(["a" * 2001 + "b", ""])) == ["a" * 1000, "a" * 1000, "ab", ""]


def test_save_and_load(tokenizer, tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for damaged in (b'{"version"', b"", b"{}", b"[]", b"\xff\xfe\x00", b'{"version": "1.0", "model": 3}'):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert has_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 0, 0)
    assert encode_texts(loaded, TEXTS[:3]) == encode_texts(tokenizer, TEXTS[:3])
    assert load_tokenizer(tmp_path, mask_token_id=5).mask_token_id == 1  # what the folder declares wins


def test_a_folder_without_a_mask_token_takes_the_given_id(tokenizer, tmp_path):
    undeclared = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    save_tokenizer(undeclared, tmp_path)
    assert load_tokenizer(tmp_path).mask_token is None
    loaded = load_tokenizer(tmp_path, mask_token_id=1, pad_token_id=0)
    assert (loaded.mask_token, loaded.pad_token) == ("<|mdm_mask|>", "<|endoftext|>")
    with pytest.raises(UserError, match="no token with id 126336"):
        load_tokenizer(tmp_path, mask_token_id=126336)


def test_a_mask_is_declared_or_gets_the_first_free_id(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    plain = load_tokenizer(tmp_path)
    assert plain.mask_token is None
    size = vocab_size(plain)
    with pytest.raises(UserError, match=f"no token with the id {size + 1}; the next .* is {size}"):
        declare_mask(plain, size + 1)
    assert declare_mask(plain, 7).mask_token == plain.convert_ids_to_tokens(7)
    with pytest.raises(UserError, match=f"mask has the id 7, not {size}"):
        declare_mask(plain, size)
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    assert declare_mask(foreign, 2).convert_ids_to_tokens(2) == "<|mdm_mask|>" == foreign.mask_token


def test_a_foreign_tokenizer_gains_what_it_lacks(shared_dir, tmp_path):
    folder = shared_dir / "data/tokenizers/gpt-neox-olmo-dolma-v1_5"
    plain = load_tokenizer(folder, eos_token_id=50279)
    before, size = encode_texts(plain, TEXTS[:3]), len(plain)
    ready = ensure_special_tokens(plain)
    assert encode_texts(ready, TEXTS[:3]) == before
    assert (ready.eos_token_id, ready.pad_token_id) == (50279, 50279)
    assert ready.mask_token_id >= size
    save_tokenizer(ready, tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    assert render_chat(load_tokenizer(tmp_path), messages) == render_chat(ready, messages)


@pytest.mark.parametrize("template", ["official", "ours"])
def test_chat_is_rendered_as_published(published, template):
    """With LLaDA's own strings: the ids of the rendered prompt spell the published example."""
    toy = train_tokenizer(TEXTS, 300)
    names = [entry["token"] for entry in published["named_tokens"]]
    toy.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if template == "official":
        toy.chat_template = OFFICIAL_TEMPLATE
    example = published["chat_template"]["example"]
    ids = render_chat(toy, example["messages"])
    assert toy.decode(ids) == example["text"]
    assert ids == toy(example["text"], add_special_tokens=False)["input_ids"]


def test_a_message_cannot_smuggle_in_special_tokens(tokenizer):
    text = "a<|eot_id|><|mdm_mask|>\ue0000\ue001 <|start_header_id|>"
    ids = render_chat(tokenizer, [{"role": "user", "content": text}])
    assert 1 not in ids
    assert ids.count(5) == 1
    assert ids.count(3) == 2
    assert text in tokenizer.decode(ids)


def refusing(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{{ messages[0].content + 1 }}", "concatenate str"),
    ],
)
def test_what_a_template_says_is_the_reason(tokenizer, template, reason):
    with pytest.raises(TemplateRefusalError, match=reason) as refused:
        render_chat(refusing(tokenizer, template), [{"role": "user", "content": "Hi"}])
    assert "\n" not in str(refused.value)


def test_calls_and_tools_are_written_or_refused(tokenizer):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<|mdm_mask|>"}}}
    turns = [{"role": "user", "content": "the cat?"}]
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(TemplateRefusalError, match="does not write tools"):
        render_chat(tokenizer, turns, tools=tools)
    with pytest.raises(TemplateRefusalError, match="does not write tool_calls"):
        render_exchange(tokenizer, turns, answer)
    able = refusing(
        tokenizer,
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|eot_id|>{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% if m.role == 'assistant' %}<|eot_id|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|eot_id|>assistant:{% endif %}",
    )
    prompt, answered = render_exchange(able, turns, answer, tools=tools)
    assert '"name": "look"' in able.decode(prompt)
    assert able.decode(answered) == '{"name": "look", "arguments": {"at": "<|mdm_mask|>"}}<|eot_id|>'
    assert tokenizer.mask_token_id not in answered


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_of_an_answer_are_written_or_refused(tokenizer, field):
    turns = [{"role": "user", "content": "the cat?"}]
    answer = {"role": "assistant", "content": "sat", field: "a mat"}
    with pytest.raises(TemplateRefusalError, match=f"does not write {field}"):
        render_exchange(tokenizer, turns, answer)
    # In the history a template may leave them out, as Qwen's does.
    render_exchange(tokenizer, [*turns, answer, *turns], {"role": "assistant", "content": "sat"})
    able = refusing(
        tokenizer,
        "{% for m in messages %}<|eot_id|>{{ m.role }}:{% if m."
        + field
        + " %}({{ m."
        + field
        + " }}){% endif %}"
        "{{ m.content }}{% endfor %}<|eot_id|>{% if add_generation_prompt %}assistant:{% endif %}",
    )
    _, answered = render_exchange(able, turns, answer)
    assert able.decode(answered) == "(a mat)sat<|eot_id|>"


def test_an_answer_ends_as_the_template_ends_a_turn(tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("metaspace first").backend_tokenizer)
    other.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% if loop.last %}<unk>{% endif %}{% endfor %}"
    )
    _, answered = render_exchange(
        other, [{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"}
    )
    assert answered[-1] == other.convert_tokens_to_ids("<|eot_id|>")  # LLaDA's own, where there is one
    chatml = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    chatml.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    chatml.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert render_exchange(
        chatml, [{"role": "user", "content": "a"}], {"role": "assistant", "content": "b"}
    ) == ([0, 2], [1, 2])


def test_render_chat_refuses_what_it_cannot_render(tokenizer):
    with pytest.raises(UserError, match="at least one message"):
        render_chat(tokenizer, [])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        render_chat(bare, [{"role": "user", "content": "Hi"}])
