# SPDX-License-Identifier: MIT
"""The name `pat` on its way through SGLang's arguments, and what happens when PAT must decline."""

from __future__ import annotations

import argparse
import copy
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from versions import attention_backends, resolve

from pat_sglang import envs
from pat_sglang.metrics import METRICS

pytestmark = pytest.mark.usefixtures("registered")


def server_args(model: str, **options):
    from sglang.srt.server_args import ServerArgs

    return resolve(ServerArgs(model_path=model, device="cpu", **options))


def test_entry_point():
    (entry,) = [e for e in entry_points(group="sglang.srt.plugins") if e.name == "pat"]
    from pat_sglang.plugin import register

    assert entry.load() is register


def test_registering_twice_changes_nothing():
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, ServerArgs

    from pat_sglang.plugin import register

    def hooked():
        """What is hooked of ServerArgs; the second one is there from 0.5.19."""
        return ServerArgs.__post_init__, getattr(ServerArgs, "resolve_once", None)

    before = dict(ATTENTION_BACKENDS), hooked()
    register()
    HookRegistry.apply_hooks()
    assert (dict(ATTENTION_BACKENDS), hooked()) == before
    assert ATTENTION_BACKEND_CHOICES.count("pat") == 1


@pytest.mark.parametrize("option", ["", "decode-", "prefill-"])
def test_command_line_accepts_the_name(option):
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(["--model-path", "dummy", f"--{option}attention-backend", "pat"])
    assert getattr(args, f"{option}attention_backend".replace("-", "_")) == "pat"


def test_translated_before_resolution_and_pickled(model_folder):
    args = server_args(model_folder, attention_backend="pat")
    assert args.attention_backend == "torch_native"
    assert attention_backends(args) == ("torch_native", "torch_native")
    assert args._pat == {"asked_by": "--attention-backend"}
    assert pickle.loads(pickle.dumps(args))._pat == args._pat
    assert copy.deepcopy(args)._pat == args._pat


def test_decode_backend_alone(model_folder):
    args = server_args(model_folder, decode_attention_backend="pat")
    assert attention_backends(args)[1] == "torch_native"
    assert args._pat == {"asked_by": "--decode-attention-backend"}


def test_prefill_backend_alone_selects_the_base_only(model_folder, caplog):
    args = server_args(model_folder, prefill_attention_backend="pat")
    assert args.prefill_attention_backend == "torch_native"
    assert not hasattr(args, "_pat")
    assert "PAT is decode attention" in caplog.text


def test_base_of_the_environment(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_BASE", "triton")
    assert server_args("dummy", attention_backend="pat").attention_backend == "triton"


def test_no_base_leaves_the_choice_to_sglang():
    from pat_sglang.plugin.server_args import translate

    args = SimpleNamespace(attention_backend="pat", device="cuda")
    translate(args)
    translate(args)
    assert args.attention_backend is None and args._pat == {"asked_by": "--attention-backend"}


def test_environment_switch(monkeypatch, model_folder):
    monkeypatch.setenv("PAT_SGLANG", "1")
    args = server_args(model_folder, attention_backend="torch_native")
    assert args._pat == {"asked_by": "PAT_SGLANG"}


def test_other_servers_are_left_alone(model_folder):
    args = server_args(model_folder, attention_backend="torch_native")
    assert not hasattr(args, "_pat")


def test_bad_variables_are_one_error(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_BASE", "fa2")
    monkeypatch.setenv("PAT_SGLANG_WORKSPACE_MIB", "-3")
    with pytest.raises(envs.EnvError) as error:
        server_args("dummy", attention_backend="pat")
    assert "PAT_SGLANG_BASE='fa2' is not valid: expected fa3 | flashinfer" in str(error.value)
    assert "PAT_SGLANG_WORKSPACE_MIB='-3'" in str(error.value)


def test_bad_variables_do_not_matter_to_others(monkeypatch):
    monkeypatch.setenv("PAT_SGLANG_BASE", "fa2")
    assert server_args("dummy", attention_backend="triton").attention_backend == "triton"


def test_values_and_defaults(monkeypatch):
    assert envs.WORKSPACE_MIB.get() == 256 and envs.BASE.get() is None
    assert envs.FORCE.get() == "auto" and envs.PAT_SGLANG.get() is False
    monkeypatch.setenv("PAT_SGLANG_WORKSPACE_MIB", "64")
    monkeypatch.setenv("PAT_SGLANG_FORCE", "off")
    monkeypatch.setenv("PAT_SGLANG_STRICT", "1")
    assert (envs.WORKSPACE_MIB.get(), envs.FORCE.get(), envs.STRICT.get()) == (64, "off", True)
    monkeypatch.setenv("PAT_SGLANG_FROCE", "on")
    assert envs.unknown_names() == ["PAT_SGLANG_FROCE"]


def test_metrics_are_plain():
    METRICS.count("plans_made")
    METRICS.count_reason("layers_on_base", "sliding window")
    METRICS.gauge("base", "fa3")
    values = METRICS.as_dict()
    assert values["plans_made"] == 1 and values["base"] == "fa3"
    assert values["layers_on_base"] == {"sliding window": 1}
    assert METRICS.get("layers_on_base") == 1


def test_repeated_steps_are_added_when_somebody_looks():
    """Two backends, one of which makes a new plan in between."""
    one, other = METRICS.repeated(), METRICS.repeated()
    METRICS.change(one, {"plans_kept": 1, "planned_kv_tokens": 10}, None)
    METRICS.change(other, {"plans_kept": 1, "planned_kv_tokens": 100}, "no prefix tree")
    one.times += 3
    assert METRICS.get("planned_kv_tokens") == 30
    other.times += 2
    one.times += 1
    METRICS.change(one, {"plans_kept": 1, "planned_kv_tokens": 1000}, None)
    one.times += 1
    values = METRICS.as_dict()
    assert (values["plans_kept"], values["planned_kv_tokens"]) == (7, 1240)
    assert values["no_sharing"] == {"no prefix tree": 2}
    assert METRICS.as_dict() == values
    one.times += 1
    METRICS.reset()
    assert METRICS.get("plans_kept") == 0
    other.times += 1
    assert METRICS.get("planned_kv_tokens") == 100


# -- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["0.5.11", "0.5.12", "0.5.13", "0.4.9"])
def test_old_versions_are_declined_with_one_line(number):
    from pat_sglang.plugin import compat

    assert "upgrade SGLang" in compat.unsupported_version(number)


@pytest.mark.parametrize("number", ["0.5.13.post1", "0.5.17", "0.5.23", "0.6.0.dev3", "git-abc"])
def test_newer_versions_are_not_declined_by_their_number(number):
    from pat_sglang.plugin import compat

    assert compat.unsupported_version(number) is None


def test_this_sglang_has_every_seam():
    from pat_sglang.plugin import compat

    assert compat.missing_seams() is None


def test_renamed_seam_is_named(monkeypatch):
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from pat_sglang.plugin import compat

    monkeypatch.setattr(ForwardBatch, "init_new", classmethod(lambda cls, worker_batch: None))
    assert "ForwardBatch.init_new(batch, model_runner)" in compat.missing_seams()


# -- hooks ----------------------------------------------------------------------------------------


def test_runtime_hooks_come_once_and_keep_the_method_kind():
    from pat_sglang.plugin import hooks

    seen = []

    class Owner:
        @classmethod
        def make(cls, value):
            return cls, value

    def hook(result, *args, **kwargs):
        seen.append((result, args, kwargs))

    hooks._after(Owner, "make", hook)
    hooks._after(Owner, "make", hook)
    assert Owner.make(value=3) == (Owner, 3)
    assert seen == [((Owner, 3), (Owner,), {"value": 3})]


def test_state_of_the_server_has_a_pat_block():
    from pat_sglang.plugin.builder import on_internal_state

    output = SimpleNamespace(internal_state={})
    METRICS.count("plans_kept")
    on_internal_state(output, None, None)
    assert output.internal_state["pat"]["plans_kept"] == 1
    assert "version" in output.internal_state["pat"]


# -- command line ---------------------------------------------------------------------------------


def command(*args):
    done = subprocess.run(
        [sys.executable, "-m", "pat_sglang", *args], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_run_loads_the_plugins_first(tmp_path, monkeypatch):
    (tmp_path / "tool.py").write_text(
        "import sys\n"
        "from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES as choices\n"
        "print(__name__, sys.argv[1:], 'pat' in choices)\n"
    )
    path = [str(tmp_path), *filter(None, [__import__("os").environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    status, out, err = command("run", "tool", "--flag", "1")
    assert status == 0, err
    assert out.splitlines()[-1] == "__main__ ['--flag', '1'] True"


def test_doctor():
    status, out, err = command("doctor")
    assert status == 0, out + err
    assert "entry point" in out and "sglang 0.5" in out and "torch_native" in out


def test_help_lists_the_variables():
    status, out, err = command("--help")
    assert status == 0, err
    for variable in envs.TABLE:
        assert f"  {variable.name} ({variable.kind})\n      {variable.meaning}\n" in out


def test_explain():
    status, out, err = command("explain", "1,4,8_32,64,16", "--heads", "8/2")
    assert status == 0, err
    assert "8 rows: 896 KV tokens without sharing, 416 unique" in out


def test_bad_command_lines_are_one_line():
    for args in (("explain", "1,3,8_1,1,1"), ("build", "--arch", "7.5")):
        status, _, err = command(*args)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err


def test_an_sglang_without_our_interfaces_gets_one_line(monkeypatch, caplog):
    import sys

    from pat_sglang.plugin import register

    monkeypatch.setitem(sys.modules, "pat_sglang.plugin.builder", None)  # as if its import failed
    monkeypatch.delattr("pat_sglang.plugin.builder", raising=False)
    register()
    assert [r.getMessage().count("does not fit this SGLang") for r in caplog.records] == [1]
    monkeypatch.setenv("PAT_SGLANG_STRICT", "1")
    with pytest.raises(ImportError):
        register()
