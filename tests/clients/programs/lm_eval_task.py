"""lm-eval asks the server the questions of a task of our own, and scores the answers."""

import json
import os
import tempfile
from pathlib import Path

from common import MODEL, QUESTION, TEXT, URL, run

# A task in a file needs nothing from a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


def score(answers):
    """The share of questions whose answer is the expected one."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(tempfile.mkdtemp())
    rows = [{"question": QUESTION, "answer": answer} for answer in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "qvl_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    told = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args=f"model={MODEL},base_url={URL}/v1/chat/completions,num_concurrent=2,max_retries=1",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return told["results"]["qvl_text"]["exact_match,none"]


def text():
    found = score([TEXT, TEXT, "something else", TEXT])
    assert found == 0.75, found


run("lm_eval", text=text)
