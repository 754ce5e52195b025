"""Run folders: one training at a time, started again where nothing was kept, and read only as they were written."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from test_training import RECIPE, TEST, TRAIN, CheckedStep, Interrupter, SoftmaxStep, interrupt, lines, without_clock

from mest_compile.base.errors import DataError, MestError, StateError, UsageError
from mest_compile.cli.running import continue_run
from mest_compile.training.loop import Trainer
from mest_compile.training.reporting import read_epochs, summary
from mest_compile.training.runfolder import RunFolder

DAMAGES = 300


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopped(folder, epoch=3):
    with pytest.raises(KeyboardInterrupt):
        Trainer(SoftmaxStep(), RECIPE, folder, Interrupter(epoch, 2, interrupt)).fit(TRAIN, TEST)


@pytest.mark.parametrize("begun", [False, True])
def test_while_one_trains_in_a_folder_another_is_refused_and_touches_nothing(tmp_path, begun):
    folder, met = tmp_path / "run", []
    if begun:
        stopped(folder)

    def meddle():
        before = contents(folder)
        for other in (
            lambda: Trainer(SoftmaxStep(), RECIPE, folder).fit(TRAIN, TEST),
            lambda: Trainer.resume(folder, SoftmaxStep()).fit(TRAIN, TEST),
        ):
            with pytest.raises(MestError, match="already holds a run|another training is at work in this folder"):
                other()
            met.append(other)
        code = f"from mest_compile.training.runfolder import RunFolder; RunFolder({str(folder)!r}).lock()"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
        assert "another training is at work in this folder" in said and contents(folder) == before

    watch = Interrupter(4, 1, meddle)
    trainer = Trainer.resume(folder, SoftmaxStep(), watch) if begun else Trainer(SoftmaxStep(), RECIPE, folder, watch)
    run = trainer.fit(TRAIN, TEST)
    assert len(met) == 2 and lines(folder) == run.history and len(run.history) == 6
    RunFolder(folder).lock().release()  # nobody trains any more


def test_two_that_begin_at_once_in_one_folder_do_not_mix(tmp_path):
    first, second = (Trainer(SoftmaxStep(), RECIPE, tmp_path / "run") for _ in range(2))
    with first._alone(), pytest.raises(StateError, match="another training"):
        second.fit(TRAIN, TEST)
    assert sorted(contents(tmp_path / "run")) == ["lock"] and not second.step.rates


def test_who_was_overtaken_between_resuming_and_training_is_told(tmp_path):
    stopped(tmp_path / "run")
    late = Trainer.resume(tmp_path / "run", SoftmaxStep())
    run = Trainer.resume(tmp_path / "run", SoftmaxStep()).fit(TRAIN, TEST)
    with pytest.raises(StateError, match="has gone on since it was resumed here; resume it again"):
        late.fit(TRAIN, TEST)
    assert lines(tmp_path / "run") == run.history


def test_a_trainer_that_was_stopped_is_not_mistaken_for_its_checkpoint(tmp_path):
    stopped(tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run", SoftmaxStep(), Interrupter(3, 2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(TRAIN, TEST)
    with pytest.raises(StateError, match="resume it again"):
        trainer.fit(TRAIN, TEST)


class Full(SoftmaxStep):
    def save(self, path, extra, arrays=None):
        raise StateError(f"checkpoint {path} cannot be written: No space left on device")


def test_a_run_that_ended_before_its_first_checkpoint_is_no_run_and_starts_again(tmp_path):
    with pytest.raises(StateError, match="No space left"):
        Trainer(Full(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    with pytest.raises(StateError, match="the run ended before its first one; start it there again, with --out"):
        Trainer.resume(tmp_path / "run", SoftmaxStep())
    (tmp_path / "run" / ".recipe.json.part").write_text("torn")
    (tmp_path / "run" / "source.json").write_text("{}")
    run = Trainer(SoftmaxStep(), replace(RECIPE, seed=4), tmp_path / "run").fit(TRAIN, TEST)
    assert len(run.history) == 6 and json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 4
    assert not (tmp_path / "run" / "source.json").exists() and not list((tmp_path / "run").glob(".*"))


def test_what_killed_writers_left_goes_when_a_run_goes_on(tmp_path):
    folder = RunFolder(tmp_path)
    for file in (folder.metrics, folder.checkpoint, folder.best):
        (tmp_path / f".{file.name}.part").write_text("torn")
    folder.diverged.touch()
    folder.remove_torn()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "lost", [["checkpoint.safetensors"], ["checkpoint.safetensors", "checkpoint.previous.safetensors"]]
)
def test_a_run_that_lost_its_checkpoint_is_still_not_overwritten(tmp_path, lost):
    Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    for name in lost:
        (tmp_path / "run" / name).unlink()
    with pytest.raises(UsageError, match="already holds a run"):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, name):
    with pytest.raises(UsageError, match="cannot write the run to .*; pass another --out") as caught:
        Trainer(SoftmaxStep(), RECIPE, tmp_path / name).fit(TRAIN, TEST)
    assert "\n" not in str(caught.value)


def damage(rng, content):
    """A copy with one thing wrong: bits turned, bytes cut out or doubled, or something else where a number was."""
    place = rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[place + rng.randrange(1, 40) :]
    if kind == 3:
        return content[:place] + content[place : place + 40] + content[place:]
    digits = b"0123456789.e-"
    start = rng.choice(
        [at for at in range(1, len(content)) if content[at] in digits[:10] and content[at - 1] in b" :["]
    )
    end = next(at for at in range(start, len(content)) if content[at] not in digits)
    return (
        content[:start]
        + rng.choice([b"null", b"NaN", b"-Infinity", b"[]", b'"a"', b"{}", b"7", b"1e999", b"[" * 5000])
        + content[end:]
    )


def test_random_damages_of_what_a_run_says_of_itself_are_refused_or_harmless(tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, whole, folder = random.Random(seed), tmp_path / "whole", tmp_path / "run"
    run = Trainer(CheckedStep(), RECIPE, whole).fit(TRAIN, TEST)
    wanted = summary(RunFolder(whole), read_epochs(RunFolder(whole)))
    shutil.copytree(whole, folder)
    refused = 0
    for _ in range(DAMAGES):
        path = folder / rng.choice(["metrics.jsonl", "recipe.json", "run.json"])
        kept = path.read_bytes()
        path.write_bytes(damage(rng, kept))
        try:
            assert summary(RunFolder(folder), read_epochs(RunFolder(folder))) == wanted | {"folder": str(folder)}
        except MestError as error:
            refused += 1
            assert "\n" not in str(error)
        try:
            assert Trainer.resume(folder, CheckedStep())._resumed[0]["history"] == run.history
        except MestError as error:
            assert "\n" not in str(error)
        path.write_bytes(kept)
    assert refused > DAMAGES // 2
    assert without_clock(Trainer.resume(folder, CheckedStep()).fit(TRAIN, TEST).history) == without_clock(run.history)


def test_without_its_checkpoint_damaged_metrics_are_still_one_line(tmp_path):
    Trainer(CheckedStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    folder, rng = RunFolder(tmp_path / "run"), random.Random(0)
    kept = folder.metrics.read_bytes()
    assert len(read_epochs(folder)) == 6
    table = [json.loads(line) for line in kept.splitlines()]
    wrong = [(key, value) for key in table[2] for value in (None, [], {}, "a", True, 1e39, [1], {"a": "b"})]
    for key, value in wrong:
        changed = [metrics | ({key: value} if metrics["epoch"] == 3 else {}) for metrics in table]
        folder.metrics.write_text("".join(json.dumps(metrics) + "\n" for metrics in changed))
        said(folder)
    for _ in range(DAMAGES):
        folder.metrics.write_bytes(damage(rng, kept))
        said(folder)


def said(folder):
    """What is reported, as JSON, or the one line of why not."""
    try:
        return json.dumps(summary(folder, read_epochs(folder)), allow_nan=False)
    except StateError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"data": 3, "data_folder": null}',
        '{"data": "digits", "data_folder": 5}',
        "7",
        '{"data": "digits", "data_folder": null, "tracker": []}',
        '{"data": "digits", "specialize": "a"}',
        '{"data": "arrays", "data_folder": "absent"}',
        "\ud800",
        '{"data": ' + "[" * 5000,
    ],
)
def test_a_damaged_source_is_one_line(tmp_path, text):
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "source.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises((StateError, DataError)) as caught:
        continue_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_the_command_line_did_not_begin_says_how_it_goes_on(tmp_path):
    stopped(tmp_path / "run")
    with pytest.raises(StateError, match="go on with --artifact and --data .*, with mest.Trainer.resume"):
        continue_run(tmp_path / "run")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_report_of_a_folder_whose_name_is_not_text_is_written(tmp_path, mest_compile_command):
    folder = tmp_path / os.fsdecode(b"run\xff")
    Trainer(SoftmaxStep(), RECIPE, folder).fit(TRAIN, TEST)
    ran = mest_compile_command("report", folder)
    assert ran.code == 0 and "run?" in (folder / "report" / "report.html").read_text(encoding="utf-8")
