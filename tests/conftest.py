"""Shared by all tests: the repository's folder, the command line run in this process, and a tracker for devices."""

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import hasty
import pytest

# Tests start hundreds of processes, which need not compile this package's modules each anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Tests run on few cores, often several processes at once: one thread each unless a test asks for more.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TVM_BIND_THREADS", "0")
# PoCL takes half as long for a test's kernels when it does not optimise them.
os.environ["POCL_EXTRA_BUILD_FLAGS"] = "-cl-opt-disable"


# Marks of whole files, by their names; a test that uses the fixture `port` is of the device as well. `make test-quick`
# runs none of them.
MARKS = {
    "opencl": ("test_opencl_*",),
    "device": ("test_device", "test_emulation", "test_serve"),
    "docs": ("test_docs", "test_docs_python"),
    "slow": (
        *(f"test_{name}" for name in ("accuracy_benchmark", "activations", "artifact", "attention", "believed")),
        *(f"test_{name}" for name in ("benchmark", "bfloat16", "block_nets", "capacity", "checking", "cli")),
        *(f"test_{name}" for name in ("combine", "continuing", "conv_transpose", "coverage_benchmark", "cutting")),
        *(f"test_{name}" for name in ("deciding", "defaults", "depthwise_step", "dropout", "family_nets")),
        *(f"test_{name}" for name in ("finetune", "finetune_cli", "float16", "freezer", "freezing", "frontend")),
        *(f"test_{name}" for name in ("frontend_training", "frozen", "fuzz", "gaps", "given_step", "gradual")),
        *(f"test_{name}" for name in ("hasty", "inputs", "interruptions", "intrinsics", "joined_nets", "joins")),
        *(f"test_{name}" for name in ("kill", "lanes", "lanes_step", "losses", "losses_cli", "masks_cli")),
        *(f"test_{name}" for name in ("method_step", "metrics", "model_state", "names", "nm_step", "nonfinite")),
        *(f"test_{name}" for name in ("norm", "normalised", "normed_depthwise", "numbers", "optimizers")),
        *(f"test_{name}" for name in ("packaging", "pairs", "passes", "patterns", "plan", "predicting", "profiling")),
        *(f"test_{name}" for name in ("rearrange", "recurrent", "reporting", "retargeting", "schemes_step")),
        *(f"test_{name}" for name in ("specializing", "speedtable", "step_arguments", "sweep", "torch_masks")),
        *(f"test_{name}" for name in ("trainable", "tuning", "turns", "tvmruntime", "types", "update_budget")),
        *(f"test_{name}" for name in ("visits",)),
    ),
}


# Files in which whole formulas, steps and runs are asked what they compute, each once. LLVM does not optimise their
# code, which takes a fifth of the time; kernels have files of their own, and test_nonfinite.py every one, as users get
# them.
HASTY = (
    "runtime/test_deciding",
    *(f"operators/test_{name}" for name in ("attention", "block_nets", "conv_transpose", "dropout", "family_nets")),
    *(f"operators/test_{name}" for name in ("joined_nets", "joins", "losses", "norm", "opencl_kernels")),
    *(f"operators/test_{name}" for name in ("activations", "opencl_patterns", "optimizers", "packing")),
    *(f"operators/test_{name}" for name in ("rearrange", "recurrent")),
    *(f"runtime/test_{name}" for name in ("artifact", "believed", "bfloat16", "depthwise_step", "exporting")),
    *(f"runtime/test_{name}" for name in ("float16", "freezing", "frozen", "given_step", "interruptions")),
    *(f"runtime/test_{name}" for name in ("method_step", "nm_step", "passes", "schemes_step", "step")),
    *("planning/test_capacity", "training/test_kill", "frontend/test_onnx_recurrent"),
)

# Tests that only `make test-thorough` runs: they take long and ask further cases of what others ask, or put together
# what others ask piece by piece. How their node ids begin.
THOROUGH = (
    "backends/test_opencl_code.py::test_code_of_a_step_is_fit_for_a_phone[adreno-650-",
    "backends/test_opencl_code.py::test_code_of_a_step_is_fit_for_a_phone[adreno-740-",
    "backends/test_opencl_code.py::test_code_of_a_step_is_fit_for_a_phone[mali-g710-",
    "backends/test_opencl_code.py::test_code_of_a_step_is_fit_for_a_phone[opencl-",
    "backends/test_opencl_frozen.py::test_a_step_freezes_as_on_the_cpu",
    "backends/test_opencl_fuzz.py::",
    "backends/test_opencl_step.py::test_a_checkpoint_of_the_device_goes_on_here[filter]",
    "backends/test_opencl_step.py::test_a_speed_table_of_the_device_",
    "backends/test_opencl_step.py::test_digits_are_learned_",
    "cli/test_cli.py::test_the_demo_from_scratch_",
    "contracts/test_docs.py::test_command_runs[mest-compile bench --model resnet32 --width 32 --batch 64 --1]",
    "contracts/test_docs.py::test_command_runs[mest-compile table --model resnet32 ",
    "contracts/test_docs.py::test_command_runs[mest-compile tune --target local ",
    "contracts/test_docs.py::test_command_runs[python benchmarks/run.py ",
    "contracts/test_docs_python.py::test_frozen_blocks_are_measured_in_turns",
    "contracts/test_docs_python.py::test_pruned_models_are_measured_in_turns",
    "contracts/test_docs_python.py::test_the_finetuning_page_trains_pruned_models",
    "contracts/test_docs_python.py::test_the_memory_page_meets_its_budget_",
    "devices/test_device.py::test_a_device_lost_in_mid_epoch_costs_the_steps_since_the_checkpoint[killed]",
    "devices/test_device.py::test_a_library_needs_nothing_but_libc_and_libm[local]",
    "devices/test_device.py::test_kernels_that_are_wrong_crash_or_hang_cost_their_trial_only",
    "devices/test_device.py::test_ten_steps_on_the_device_equal_torch_as_they_do_here[pattern]",
    "devices/test_device.py::test_ten_steps_on_the_device_equal_torch_as_they_do_here[unstructured]",
    "devices/test_device.py::test_tuning_over_the_tracker_keeps_what_an_emulated_device_says_apart[True]",
    "devices/test_device.py::test_tuning_goes_on_when_its_device_is_killed_and_another[is there]",
    "devices/test_emulation.py::test_goals_on_the_stages_of_a_wide_residual_net[pattern",
    "devices/test_emulation.py::test_goals_on_the_stages_of_a_wide_residual_net[unstructured",
    "devices/test_opencl_remote.py::test_a_run_over_the_tracker_trains_as_one_that_runs_here",
    "devices/test_opencl_remote.py::test_tuning_over_the_tracker_",
    "devices/test_opencl_remote.py::test_what_makes_the_runtime_says_what_is_missing",
    "devices/test_serve.py::test_a_device_behind_a_tracker_measures",
    "finetuning/test_finetune.py::test_what_was_stopped_goes_on_bit_for_bit",
    "finetuning/test_opencl_finetune.py::",
    "kernels/test_building.py::test_several_processes_share_a_folder_",
    "kernels/test_parsing.py::test_every_kernel_is_the_function_that_tvm_reads",
    "kernels/test_specializing.py::test_rounds_and_batches_that_a_known_length_",
    "kernels/test_specializing.py::test_specialized_kernels_give_the_same_bits_before_during_and_after_an_exchange[filter]",
    "kernels/test_specializing.py::test_specialized_kernels_give_the_same_bits_before_during_and_after_an_exchange[pattern]",
    "measuring/test_accuracy_benchmark.py::test_a_run_becomes_an_entry[em_s]",
    "measuring/test_accuracy_benchmark.py::test_the_pace_of_every_published_kind_is_measured",
    "measuring/test_benchmark.py::test_planned_memory_is_what_a_process_that_loads_the_step_needs[resnet20-",
    "measuring/test_small_benchmark.py::test_every_side_takes_its_turns",
    "measuring/test_speedtable.py::test_a_torch_module_of_ones_own_is_measured_and_left_alone",
    "operators/test_attention.py::test_three_steps_equal_torchs[ways2-opencl-",
    "operators/test_attention.py::test_three_steps_equal_torchs[ways4-opencl-",
    "operators/test_family_nets.py::test_three_steps_of_further_families_",
    "operators/test_opencl_kernels.py::test_activation[",
    "operators/test_opencl_kernels.py::test_backward_of_a_batch_norm_that_stays_as_it_is",
    "operators/test_opencl_kernels.py::test_batch_norm_backward",
    "runtime/test_artifact.py::test_a_device_without_a_compiler_trains_is_killed_resumes_and_ends_as_the_compiled_step[emulated]",
    "runtime/test_float16.py::test_an_arm_cpu_without_float16_arithmetic_converts[cortex-a76]",
    "runtime/test_float16.py::test_checkpoints_and_artifacts_keep_it",
    "runtime/test_float16.py::test_ten_steps_of_a_deep_net_are_near_torch",
    "runtime/test_float16.py::test_ten_steps_on_the_emulated_device_",
    "training/test_notebook.py::",
    "tuning/test_opencl_tuning.py::test_tune_for_a_device_with_little_local_memory",
    "tuning/test_tuning.py::test_tune_goes_on_after_kill_9_",
    *(
        f"runtime/test_fuzz.py::test_a_random_layer_computes_what_torch_computes_in_float64[{seed}]"
        for seed in range(10, 27)
    ),
)

# Families of cases that ask one thing of many shapes or combinations: `make test` asks one of every so many in a row,
# each time at another place of the row. How many, of the families of a file.
SAMPLED = {
    "backends/test_opencl_frozen": {"ten_steps_train_what_torch_trains": 2},
    "backends/test_opencl_step": {"steps_with_a_mutation_between_them_equal_masked_torch": 2},
    "operators/test_activations": {"three_steps_equal_torchs": 2, "which_activations_batch_norm_takes_in": 2},
    "operators/test_combine": {"three_steps_of_scales_and_spreads_equal_torchs": 2},
    "operators/test_depthwise": {"kernels_give_what_their_references_give": 2},
    "operators/test_dropout": {"three_steps_equal_torchs_that_drops_the_same": 2},
    "operators/test_gather": {"activations_in_float16": 2},
    "operators/test_joins": {"three_steps_equal_torchs": 2},
    "operators/test_lanes": {"both_convolutions_are_their_references_and_leave_halos_zero": 2},
    "operators/test_losses": {"steps_of_every_loss_equal_torch": 3, "steps_of_mean_squared_error_equal_torch": 2},
    "operators/test_nonfinite": {"a_kernel_gives_what_its_reference_gives": 2},
    "operators/test_norm": {"three_steps_equal_torchs": 2},
    "operators/test_normed_depthwise": {"kernels_give_what_their_references_give": 2},
    "operators/test_opencl_kernels": {
        "a_kernel_gives_what_its_reference_gives": 2,
        "a_loss_is_its_reference_and_torchs": 3,
        "an_epilogue_scales_adds_and_activates_once": 2,
        "avg_pool": 3,
        "backward_neither_reads_nor_writes_what_is_dead": 2,
        "combine": 3,
        "convolutions_of_random_sizes": 2,
        "dead_rows_and_full_rows": 2,
        "dropout": 3,
        "kernels_give_what_their_references_give": 2,
        "knobs_change_speed_alone": 2,
        "max_pool": 2,
        "norm": 3,
        "resize": 2,
    },
    "operators/test_operators": {
        "a_loss_is_its_reference_and_torchs": 3,
        "activation": 2,
        "attention": 2,
        "backward_of_a_batch_norm_that_stays_as_it_is": 2,
        "batch_norm_backward": 2,
        "combine": 3,
        "dropout": 2,
        "norm": 3,
    },
    "operators/test_optimizers": {"ten_steps_of_every_scheme_equal_masked_torch": 2},
    "operators/test_rearrange": {"three_steps_equal_torchs": 2},
    "operators/test_recurrent": {"three_steps_equal_torchs": 2},
    "planning/test_capacity": {"what_a_layer_keeps_for_the_next_mutation_is_counted": 3},
    "planning/test_retargeting": {"facts_for_another_device_and_batch_are_those_of_compiling_for_it": 2},
    "runtime/test_float16": {"ten_steps_equal_torch_that_rounds_where_values_are_stored": 2},
    "runtime/test_passes": {"passes_over_a_net_without_batch_statistics_are_the_whole_batch": 2},
    "runtime/test_schemes_step": {
        "steps_with_a_mutation_between_them_equal_masked_torch_and_continue_from_a_checkpoint": 2,
    },
    "runtime/test_step": {"ten_steps_equal_ten_steps_of_masked_torch": 2},
    "training/test_metrics": {"a_run_is_judged_by_the_metrics_of_its_loss": 2},
    "training/test_predicting": {"a_picture_is_answered_as_the_loss_means_outputs": 2},
    "tuning/test_tuning": {"every_choice_of_every_knob_keeps_the_meaning": 2},
}
READ_ANEW = ("contracts", "frontend", "models")  # folders of tests that ask how a module is read


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    marks = cache(lambda stem: [mark for mark, files in MARKS.items() if any(fnmatch(stem, file) for file in files)])
    met = Counter()
    for item in items:
        for mark in marks(item.path.stem):
            item.add_marker(mark)
        if "port" in item.fixturenames:
            item.add_marker("device")
        name = item.nodeid.removeprefix("tests/")
        file, _, case = name.partition(".py::test_")
        of = SAMPLED.get(file, {}).get(case.partition("[")[0], 1)
        number = met[file, item.originalname]
        met[file, item.originalname] += 1
        if name.startswith(THOROUGH) or (number + number // of) % of:
            item.add_marker("thorough")


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def kept_kernels(pytestconfig, repository, tmp_path_factory) -> Path:
    """Where kernels that tests run are kept between tests, processes and sessions for as long as the code that makes
    them is the same.
    """
    from mest_compile.hardware.folders import digest

    makers = [repository / "tests" / "lib" / "hasty.py"] + [
        path
        for part in ("kernels", "backends", "hardware")
        for path in sorted((repository / "mest_compile" / part).rglob("*.py"))
    ]
    if not hasattr(pytestconfig, "cache"):  # told to keep none
        return tmp_path_factory.mktemp("kernels")
    kernels = pytestconfig.cache.mkdir("kernels")
    made_by = digest(b"".join(path.read_bytes() for path in makers))
    for stale in kernels.iterdir():
        if stale.name != made_by:
            shutil.rmtree(stale, ignore_errors=True)
    return kernels / made_by


@pytest.fixture(scope="session")
def usual_builder(kept_kernels):
    """Of kernels as users get them. Builders of tests that are about building have cold folders of their own."""
    from mest_compile.kernels.cache import Builder

    return Builder(folder=kept_kernels / "usual")


@pytest.fixture(scope="session")
def hasty_builder(kept_kernels):
    """For files whose builders are hasty."""
    from mest_compile.kernels.cache import Builder

    return Builder(folder=kept_kernels / "hasty" / "mest-compile" / "kernels")


@pytest.fixture(scope="module")
def builder(request):
    """Of the kernels of one file's tests."""
    return request.getfixturevalue("hasty_builder" if is_hasty(request.path) else "usual_builder")


@pytest.fixture(scope="module", autouse=True)
def kernels_of_it(request):
    """How what one file's tests have compiled is read and compiled."""
    kept = request.getfixturevalue("kept_kernels")
    with pytest.MonkeyPatch.context() as patch:
        if is_hasty(request.path):
            hasty.compile_hastily(patch, kept / "hasty")
        if request.path.parent.name not in READ_ANEW:
            hasty.remember_own_nets(patch, kept / "graphs")
        yield


def is_hasty(path: Path) -> bool:
    return f"{path.parent.name}/{path.stem}" in HASTY


@pytest.fixture
def drivers_optimise(monkeypatch):
    monkeypatch.delenv("POCL_EXTRA_BUILD_FLAGS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where processes that serve write their logs."""
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def port(folder):
    """The port of a tracker on 127.0.0.1."""
    from device import emulated

    with emulated.tracker(folder) as (_, port):
        yield port


@pytest.fixture
def mest_compile_command(capsys):
    """A function that runs `mest-compile ...` in this process."""
    from mest_compile.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(stop.value.code, printed.out, printed.err)

    return run
