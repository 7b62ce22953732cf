"""Runs every task of configs/paper and configs/suite_2026.yaml, from the names in the YAML file to the report, on small stand-ins.

    python tests/rehearsal/rehearse.py FOLDER

Tiny checkpoints and data sets lie under their published names on a hub of this machine, and nothing between the sweep file and the
report is replaced. Then an oracle answers the same tasks. FOLDER/rehearsal.json says what came of every task; it is printed, too.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# By file. The other files of LLaVA-1.5 have the tasks of Table 1
SWEEPS = (
    "paper/table1_llava15_7b.yaml",
    "paper/table2_llava_next_7b.yaml",
    "paper/table3_qwen2_vl_7b.yaml",
    "paper/table4_llava_video_7b.yaml",
    "paper/table7_qwen3_vl_4b.yaml",
    "suite_2026.yaml",
)
PRUNED = ("paper/table1_llava15_7b.yaml", "paper/table4_llava_video_7b.yaml")  # VLM-Pruner runs beside the unpruned model
LIMITS = {"paper/table3_qwen2_vl_7b.yaml": 6}  # of questions to the checkpoint, which takes long over 1,280 tokens a picture; all of POPE's
SHORT = {"dtype": "float32", "layers": None}  # what a tiny checkpoint on a CPU has otherwise


def use_hub(address: str, home: Path) -> None:
    """Point huggingface_hub and datasets, which must not have been imported yet, to a hub and an empty cache."""
    assert "huggingface_hub" not in sys.modules
    os.environ |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_rehearsal", "HF_HUB_OFFLINE": "0"}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def read(name: str) -> Any:
    """A sweep file with fewer methods and frames, on a tiny checkpoint."""
    from vlm_pruner_eval.sweep.config import load
    from vlm_pruner_eval.sweep.grid import method_problems

    config = load(ROOT / "configs" / name, check=method_problems)
    model = SHORT | ({} if config.model.max_frames_num is None else {"max_frames_num": 4})
    here = [task for task in config.tasks if task != "longvideobench_val_v" or importlib.util.find_spec("decord")]
    methods = [entry for entry in config.methods if entry.name == "vlmpruner"][: name in PRUNED]
    fewest = {name: getattr(config, name)[-1:] for name in ("pruning_rates", "keep_tokens") if getattr(config, name) is not None}
    return config.model_copy(update={"model": config.model.model_copy(update=model), "methods": methods, "tasks": here, **fewest})


class Rehearsal:
    """The sweeps of one process, which share lmms-eval's task index."""

    def __init__(self, folder: Path):
        from lmms_eval import models  # noqa: F401  # loads the plugin
        from lmms_eval.tasks import TaskManager

        self.folder = folder
        self.index = TaskManager(verbosity="ERROR", model_name="vlmpruner_llava")
        self.prompts: dict[str, str] = {}

    def sweep(self, config: Any, folder: Path, load: Callable) -> int:
        """Run a sweep; returns the number of failed runs."""
        from rich.console import Console

        from vlm_pruner_eval.lmms.plugin import prompt_name
        from vlm_pruner_eval.sweep.runner import run_sweep

        manager = copy.copy(self.index)
        manager.model_name = prompt_name(config.model.id)
        return run_sweep(config, folder, load=load, task_manager=manager, console=Console(stderr=True)).failed

    def load(self, model_id: str, **model_args: Any) -> Any:
        """A checkpoint from the hub; keeps the first prompt of every task."""
        from vlm_pruner_eval.lmms import load

        model = load(model_id, **model_args)
        render = model.prompts.render

        def rendered(request: Any, chat: Any) -> Any:
            prompt = render(request, chat)
            if request.doc_id == 0:
                self.prompts[request.task] = prompt.text
            return prompt

        model.prompts.render = rendered
        return model

    def rows_of(self, name: str) -> list[dict[str, Any]]:
        """Run a file on its checkpoint and on the oracle; a mapping a task."""
        from oracle import Oracle

        from vlm_pruner_eval.report.paper.printed import benchmark_of, paper_model

        config, stem = read(name), Path(name).stem
        self.prompts = {}
        limited = config.model_copy(update={"limit": LIMITS.get(name)})
        failed = self.sweep(limited, self.folder / stem / "tiny", self.load)
        failed += self.sweep(config, self.folder / stem / "oracle", lambda model_id, **model_args: Oracle())
        tiny = unpruned(report(self.folder / stem / "tiny", whole=False))
        reported = report(self.folder / stem / "oracle", whole=name in PRUNED)
        perfect, printed = unpruned(reported), beside(reported)
        paper = paper_model(config.model.pretrained)
        rows = []
        for task in config.tasks:
            column = benchmark_of(task, paper.vlm) if paper else None
            got = {"value": tiny[task]["value"], "perfect": perfect[task]["value"], "metric": perfect[task]["metric"]}
            asked = {leaf: text for leaf, text in self.prompts.items() if leaf == task or leaf.startswith(f"{task}_")}
            known = {"file": name, "task": task, "column": column, "beside": printed.get(task), "failed": failed, "prompts": asked}
            rows.append(known | got)
        return rows


def report(folder: Path, *, whole: bool) -> dict[str, Any]:
    """Report a sweep; `whole` draws the figures, too. Gives the contents of report.json."""
    from vlm_pruner_eval.report.build import as_json, write
    from vlm_pruner_eval.report.contents import report_of
    from vlm_pruner_eval.report.load import load_sweep
    from vlm_pruner_eval.store.schema import to_json

    made = report_of(load_sweep(folder))
    if whole:
        write(made)
    return json.loads(to_json(as_json(made)))


def unpruned(held: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The unpruned row's score of every task, and its metric in the record of its run."""
    cells = next(row for row in held["rows"] if row["method"] == "none")["cells"]
    record = next(run["record"] for run in held["runs"] if run["key"] == "unpruned")
    scores = {task: score for unit in record["units"].values() for task, score in unit["scores"].items()}
    return {task: {"value": cell["value"], "metric": scores[task]["main"]["metric"]} for task, cell in cells.items()}


def beside(held: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Our score of the unpruned model beside the printed one, by task that has one."""
    verdicts = (held["paper"] or {"gate": {"tasks": []}})["gate"]["tasks"]
    return {
        verdict["task"]: {"ours": verdict["score"], "printed": number["value"], "difference": verdict["score"] - number["value"]}
        for verdict in verdicts
        if (number := verdict["printed"]) is not None
    }


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a task: metric, score of perfect answers, column of the paper, and if its prompts are as expected."""
    from expected_prompts import EXPECTED, ORIGIN

    for row in rows:
        same = row["prompts"] == EXPECTED[row["file"]].get(row["task"])
        column = f"column {row['column']}" if row["column"] else "no column"
        prompt = f"prompt {'equal' if same else 'DIFFERS'} ({ORIGIN[row['file']]})"
        yield f"{Path(row['file']).stem} | {row['task']} | {row['metric']} | perfect answers {row['perfect']:g} | {column} | {prompt}"


def main(folder: Path) -> None:
    from loopback_hub import serving

    hub = folder / "hub"
    with serving(hub) as address:
        use_hub(address, folder / "home")
        from checkpoints import write_checkpoints
        from standin_videos import write_videos
        from standins import write_pictures

        write_pictures(hub / "datasets")
        write_videos(hub / "datasets")
        write_checkpoints(hub / "models")
        rehearsal, rows = Rehearsal(folder), []
        for name in SWEEPS:
            rows += rehearsal.rows_of(name)
    (folder / "rehearsal.json").write_text(json.dumps(rows, indent=1))
    print("\n".join(lines(rows)))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]
    main(Path(sys.argv[1]))
