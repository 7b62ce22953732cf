"""`show`, flips and the gallery, on real sweeps of tiny models: read from records alone."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stored
from PIL import Image, ImageChops
from report_sweeps import edit, write_answers
from rich.console import Console
from sweep_standin import task_manager
from thinning import only
from tiny_checkpoints import checkpoint
from typer.testing import CliRunner

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.cli import app
from vlm_pruner_eval.embedded import tasks_path
from vlm_pruner_eval.report.geometry.views import Medium, views
from vlm_pruner_eval.report.load import Results, load_sweep
from vlm_pruner_eval.report.show.documents_shown import Document, Place, Reply, find_place, pick_runs, read_documents
from vlm_pruner_eval.report.show.draw import LARGE, SMALL, draw, geometry_of
from vlm_pruner_eval.report.show.flips import Flip, drawable_first, find_flips
from vlm_pruner_eval.report.show.gallery import disagreement, gallery
from vlm_pruner_eval.store.answers import read_answers
from vlm_pruner_eval.store.folder import DocumentScore, Store
from vlm_pruner_eval.store.schema import to_json
from vlm_pruner_eval.sweep.config import validate
from vlm_pruner_eval.sweep.images import ImageStore
from vlm_pruner_eval.sweep.runner import run_sweep

TASKS = ["digitscenes_attribute", "digitscenes_read"]
LIMIT, GALLERY = 5, 3


def sweep(output: Path, **changes: object) -> Path:
    raw = {
        "name": "shown",
        "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 5, "visual_tokens": 576},
        "tasks": TASKS,
        "pruning_rates": ["1/2", "8/9"],
        "methods": [{"name": "vlmpruner", "label": "VLM-Pruner"}, {"name": "random", "seeds": [0, 1]}, "blind"],
        "limit": LIMIT,
        "gallery": GALLERY,
        "share_prefix": True,
    }
    config = validate(raw | changes)
    tasks = task_manager(tasks_path(), config.model.id)
    outcome = run_sweep(config, output, console=Console(quiet=True), task_manager=tasks)
    assert outcome.failed == 0
    return output


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("swept"))


@pytest.fixture(scope="module")
def results(swept: Path) -> Results:
    return load_sweep(swept)


def one(results: Results, task: str = TASKS[0], doc_id: int = 0, **picked: object) -> Document:
    (document,) = read_documents(results, pick_runs(results, **picked), {(task, doc_id)}, doc_id)
    return document


# ---- records
def test_a_document_has_its_question_its_gold_and_every_runs_answer(results: Results, swept: Path) -> None:
    document = one(results)
    assert str(document.place) == "digitscenes_attribute/test/0"
    assert document.question.startswith("what colour is the ") and document.gold
    assert [reply.label for reply in document.replies.values()] == [
        "unpruned",
        "VLM-Pruner, 8/9 removed",
        "random, 8/9 removed, seed 0",
        "blind",
    ]
    unpruned, ours, _, blind = document.replies.values()
    assert (len(unpruned.order), len(ours.order), len(blind.order)) == (576, 64, 0)
    assert unpruned.layouts == ((576, 24, 24, 1),)
    (answer,) = [answer for answer in stored.answers(swept, "vlm-pruner-8of9") if (answer.task, answer.doc_id) == (TASKS[0], 0)]
    (score,) = [one.score for one in stored.scores(swept, "vlm-pruner-8of9") if (one.task, one.doc_id) == (TASKS[0], 0)]
    assert (ours.answer, list(ours.order), ours.score) == (answer.answer, answer.record.order, score)
    assert ours.is_right is (answer.answer == document.gold)


def test_runs_are_picked_by_method_label_key_and_rate(results: Results) -> None:
    def keys(*methods: str, rate: str | None = None) -> list[str]:
        return [run.key for run in pick_runs(results, methods, rate)]

    assert keys() == ["unpruned", "vlm-pruner-8of9", "random-8of9-seed0", "blind"]
    assert keys(rate="0.5") == keys(rate="1/2") == ["unpruned", "vlm-pruner-1of2", "random-1of2-seed0", "blind"]
    assert keys("random", "VLMPRUNER", rate="0.889") == ["unpruned", "random-8of9-seed0", "vlm-pruner-8of9"]
    assert keys("vlm-pruner", "random-1of2-seed1") == ["unpruned", "vlm-pruner-8of9", "random-1of2-seed1"]
    with pytest.raises(ConfigError, match=r"got 'randm', .* did you mean 'random'\? Known: VLM-Pruner, blind, random\."):
        keys("randm")
    with pytest.raises(ConfigError, match="--rate: got 2/3, expected one of the sweep's: 1/2, 8/9"):
        keys(rate="2/3")


def test_a_document_is_named_in_full_or_with_its_task(results: Results) -> None:
    place = Place("digitscenes_read", "test", 2)
    assert find_place(results, "digitscenes_read/test/2") == find_place(results, "digitscenes_read/2") == place
    assert find_place(results, "2", task="digitscenes_read") == place
    for text, task, sentence in (
        ("2", None, "in a sweep of 2 tasks; name one with --task: digitscenes_attribute, digitscenes_read"),
        ("digitscenes_red/test/2", None, "did you mean 'digitscenes_read'"),
        ("digitscenes_read/val/2", None, "got the split 'val' of digitscenes_read, expected 'test'"),
        ("digitscenes_read/test/two", None, "expected TASK/SPLIT/ID or ID with --task"),
        ("a/b/c/2", None, "expected TASK/SPLIT/ID"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            find_place(results, text, task)


def test_choices_of_one_document_are_one_answer(swept: Path, tmp_path: Path) -> None:
    """Tasks of type multiple_choice have an answer a choice; the score says which is the likeliest."""
    root = Path(shutil.copytree(swept, tmp_path / "swept"))
    (folder,) = root.glob(f"runs/unpruned-*/{TASKS[0]}")
    (first, *_) = read_answers(folder)
    write_answers(folder, [dataclasses.replace(first, choice=i, answer=text) for i, text in enumerate(["red", "blue"])])
    edit(root, "unpruned", lambda record: record.update(n_answers=2), TASKS[0])
    (folder / "scores.jsonl").write_text(to_json(DocumentScore(task=TASKS[0], doc_id=0, answer=1, score=1.0), indent=None) + "\n")
    results = load_sweep(root)
    run = pick_runs(results)[0]
    (document,) = read_documents(results, [run], {(TASKS[0], 0)}, 0)
    assert document.replies[run.key].answer == "blue"


# ---- pictures
def test_a_sheet_has_a_panel_a_method_and_a_small_one_leaves_the_words_out(results: Results) -> None:
    large, small = (Image.open(io.BytesIO(draw(results, one(results), sheet))) for sheet in (LARGE, SMALL))
    assert large.format == "PNG" and large.width > 2 * LARGE.panel and small.width < LARGE.across
    two, three = (Image.open(io.BytesIO(draw(results, one(results, methods=names)))) for names in (["random"], ["random", "vlmpruner"]))
    assert three.width > two.width or three.height > two.height
    assert ImageChops.difference(two.crop((0, 200, 300, 400)), three.crop((0, 200, 300, 400))).getbbox() is None, "the unpruned panel"


def _stub(results: Results, root: Path, geometry: dict | None) -> Results:
    """The same sweep, its pictures elsewhere and its processor another."""
    run = results.runs[0]
    model = {"geometry": geometry} if geometry else {}
    provenance = run.record.provenance.model_copy(update={"model": model})
    units = {task: unit.model_copy(update={"provenance": provenance}) for task, unit in run.record.units.items()}
    record = run.record.model_copy(update={"units": units})
    return dataclasses.replace(results, store=Store(root), runs=(dataclasses.replace(run, record=record),))


def _document(layouts: tuple[tuple[int, ...], ...], images: tuple[str, ...]) -> Document:
    n = sum(layout[0] for layout in layouts)
    order = tuple(range(0, n, 3))
    return Document(Place("t", "test", 0), "what?", "this", images, {"a": Reply("ours", "this", 1.0, order, layouts, n)})


def has_colour(png: bytes, colour: tuple[int, int, int]) -> bool:
    return any(found == colour for _, found in Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24))


def test_a_layout_that_does_not_fit_is_a_sentence_in_place_of_its_panel(results: Results, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 48), (0, 255, 0))
    ImageStore(tmp_path).save_image("aa", image)
    (drawn,) = ImageStore(tmp_path).read("aa").images
    stub = _stub(results, tmp_path, {"family": "qwen2_vl", "temporal_patch": 2})
    green = drawn.getpixel((10, 10))
    assert has_colour(draw(stub, _document(((12, 3, 4, 1),), ("aa",))), green)
    assert not has_colour(draw(stub, _document(((13, 3, 4, 1),), ("aa",))), green)


def test_frames_of_a_video_are_drawn_side_by_side(results: Results, tmp_path: Path) -> None:
    import numpy as np

    colours = np.array([[200, 30 * t, 0] for t in range(6)], dtype=np.uint8)
    ImageStore(tmp_path).save_video("aa", np.broadcast_to(colours[:, None, None], (6, 48, 64, 3)))
    stored = [image.getpixel((30, 20)) for image in ImageStore(tmp_path).read("aa").images]
    geometry = {"family": "qwen2_vl", "temporal_patch": 2}
    png = draw(_stub(results, tmp_path, geometry), _document(((36, 3, 4, 3),), ("aa",)))
    assert [has_colour(png, colour) for colour in stored] == [True, False, True, False, True, False], "a token holds two frames"


def test_records_that_do_not_tell_are_a_sentence(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not say how images became tokens; run the sweep again"):
        draw(_stub(results, tmp_path, None), one(results))
    with pytest.raises(ConfigError, match="names no image"):
        draw(results, _document(((12, 3, 4, 1),), ()))
    with pytest.raises(ConfigError, match=r"was not kept; a sweep keeps those of its first documents"):
        draw(results, one(results, doc_id=GALLERY))


@pytest.mark.parametrize("family", only(["llava_next", "llava_onevision", "qwen2_vl", "internvl"], ["llava_next"]))
def test_every_family_can_be_shown_after_a_sweep(family: str, tmp_path: Path) -> None:
    model = {"id": f"vlmpruner_{family}", "pretrained": checkpoint(family), "batch_size": 2}
    output = sweep(tmp_path / "out", model=model, tasks=TASKS[:1], pruning_rates=["1/2"], methods=["vlmpruner"], limit=2, gallery=1)
    found = load_sweep(output)
    document = one(found)
    image = ImageStore(output).read(document.images[0])
    for reply in document.replies.values():
        pictures = views(geometry_of(found), [Medium(image.width, image.height)], reply.layouts)
        boxes = {token for view in pictures for token in view.boxes}
        assert sum(layout[0] for layout in reply.layouts) == reply.n_visual
        assert set(reply.order) <= set(range(reply.n_visual)) and len(boxes & set(reply.order)) > len(reply.order) / 2
        assert len(pictures) == {"qwen2_vl": 1}.get(family, 2)
    answer = CliRunner().invoke(app, ["show", str(output), "--doc", "0", "--json"])
    assert answer.exit_code == 0, answer.output
    assert Path(json.loads(answer.stdout)["picture"]).is_file()


# ---- flips
def test_flips_are_those_that_the_scores_say(results: Results) -> None:
    flips = find_flips(results, "unpruned", "blind")
    scores = [{(one.task, one.doc_id): one.score for one in results.each_score(run.run_id)} for run in (flips.first, flips.second)]
    expected = {key: score > scores[1][key] for key, score in scores[0].items() if score != scores[1][key]}
    assert {(flip.place.task, flip.place.doc_id): flip.to_wrong for flip in flips.flips} == expected
    assert expected and flips.n_documents == 2 * LIMIT
    assert [flip.to_wrong for flip in flips.flips] == sorted(expected.values(), reverse=True)
    back = find_flips(results, "blind", "none")
    assert {(flip.place, flip.before, flip.after) for flip in back.flips} == {(flip.place, flip.after, flip.before) for flip in flips.flips}
    only = find_flips(results, "unpruned", "blind", task=TASKS[1])
    assert only.n_documents == LIMIT and {flip.place.task for flip in only.flips} <= {TASKS[1]}


def test_flips_that_can_not_be_told_are_sentences(results: Results) -> None:
    with pytest.raises(ConfigError, match="which are the same run; name two"):
        find_flips(results, "random", "random-8of9-seed0")
    with pytest.raises(ConfigError, match="no document of nothing has a score of its own"):
        find_flips(results, "unpruned", "blind", task="nothing")


def test_flips_are_drawn_both_ways_in_turn_where_the_picture_was_kept() -> None:
    places = [Place("t", "test", i) for i in range(6)]
    flips = [Flip(place, i < 4, "a", "b") for i, place in enumerate(places)]
    assert [flip.place.doc_id for flip in drawable_first(flips, set(places) - {places[1]})] == [0, 4, 2, 5, 3]


# ---- gallery
def test_the_gallery_takes_tasks_in_turn_and_disputed_documents_first(results: Results) -> None:
    pictures = gallery(results, n=2 * GALLERY)
    assert len(pictures) == 2 * GALLERY
    assert [picture.title.partition("/")[0] for picture in pictures] == TASKS * GALLERY
    documents = {str(document.place): document for document in read_documents(results, pick_runs(results), None, GALLERY - 1)}
    for task in TASKS:
        disputes = [disagreement(documents[picture.title]) for picture in pictures if picture.title.startswith(task)]
        assert disputes == sorted(disputes, reverse=True)
    first = pictures[0]
    assert Image.open(io.BytesIO(first.png)).format == "PNG" and len(first.png) < 400_000
    assert list(first.answers) == ["unpruned", "VLM-Pruner, 8/9 removed", "random, 8/9 removed, seed 0", "blind"]
    assert "Patches kept: VLM-Pruner, 8/9 removed 64, random, 8/9 removed, seed 0 64." in first.alt
    assert first.question == documents[first.title].question and first.gold == documents[first.title].gold
    assert [picture.title for picture in gallery(results, n=1)] == [first.title]
    assert gallery(results, n=0) == []


def test_a_sweep_that_kept_no_picture_has_no_gallery(tmp_path: Path) -> None:
    output = sweep(tmp_path / "out", tasks=TASKS[:1], methods=["blind"], pruning_rates=["8/9"], limit=1, gallery=0)
    assert not (output / "images").exists()
    assert gallery(load_sweep(output)) == []


# ---- the command
def run(*arguments: object) -> tuple[int, str]:
    answer = CliRunner().invoke(app, ["show", *map(str, arguments)])
    return answer.exit_code, answer.output


def test_show_prints_the_answers_and_writes_the_picture(swept: Path, tmp_path: Path) -> None:
    code, text = run(
        swept, "--doc", "digitscenes_read/test/1", "--methods", "vlmpruner,blind", "--rate", "1/2", "--out", tmp_path / "a.png"
    )
    assert code == 0, text
    assert "what is the number" in text and "288 of 576" in text and "0 of 576" in text
    assert "random" not in text and "VLM-Pruner, 1/2 removed" in text
    assert text.splitlines()[-1] == str(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 900


def test_show_lists_flips_and_draws_the_first(swept: Path, tmp_path: Path) -> None:
    code, text = run(swept, "--flips", "unpruned", "blind", "--n", 2, "--out", tmp_path / "flips")
    assert code == 0, text
    summary = json.loads(run(swept, "--flips", "unpruned", "blind", "--n", 2, "--out", tmp_path / "flips", "--json")[1])
    listed = json.loads((tmp_path / "flips" / "flips.json").read_text())
    assert summary["documents"] == 2 * LIMIT and summary["flips"] == len(listed) > 0
    assert "are right with unpruned and wrong with blind" in text
    assert len(summary["pictures"]) == 2 and all(Image.open(path).format == "PNG" for path in summary["pictures"])
    assert all(name in text for name in (flip["place"] for flip in listed[:3]))


def test_bad_requests_are_sentences_and_exit_code_2(swept: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, sentence in (
        ((swept, "--doc", "digitscenes_read/test/99"), "was not answered; the sweep's limit is 5 documents a task"),
        ((swept, "--doc", "digitscenes_read/test/1", "--out", tmp_path / "file" / "a.png"), "can't be written"),
    ):
        code, text = run(*arguments)
        assert (code, sentence in text) == (2, True), text


def test_no_model_is_needed(swept: Path, tmp_path: Path) -> None:
    arguments = ["show", str(swept), "--doc", "digitscenes_read/test/1", "--out", str(tmp_path / "a.png")]
    code = (
        "import sys; from vlm_pruner_eval.cli import main; from vlm_pruner_eval.report.show import flips, gallery\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'lmms_eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert (tmp_path / "a.png").is_file()
