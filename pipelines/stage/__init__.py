"""What every command shares: its way in and out (command), its output folder (artifact), MLflow (tracking), Ray (cluster).

Change it freely, but keep what stage.json and manifest.json say: folders of earlier versions must go on.
Imports llada; nothing else of pipelines.
"""
