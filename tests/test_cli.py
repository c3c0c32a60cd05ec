import contextlib
import errno
import json
import signal
import subprocess
import sys

import pytest

from hf_csm.cli import explain, main, run_command
from hf_csm.commands.data import corpus_options, launched_as
from hf_csm.corpora import all_builders
from hf_csm.errors import UserError
from hf_csm.prepare.builder import CorpusConfig, config_options
from hf_csm.testing.ravdess import write_ravdess


def error_lines(capsys):
    return capsys.readouterr().err.strip().splitlines()


def test_a_user_error_is_two_lines_and_status_1(capsys):
    def fail():
        raise UserError("The file is empty.", "Write it again.")

    assert run_command(fail) == 1
    assert error_lines(capsys) == ["error: The file is empty.", "       Write it again."]


def test_debug_shows_the_traceback():
    def fail():
        raise UserError("The file is empty.", "Write it again.")

    with pytest.raises(UserError):
        run_command(fail, debug=True)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "Not allowed"), (errno.EACCES, "Not allowed"), (errno.EIO, "/x")],
)
def test_disk_errors_have_a_plain_message(code, words):
    problem, remedy = explain(OSError(code, "message", "/x"))
    assert words in problem
    assert "/x" in problem
    assert remedy


def test_a_full_disk_is_recognized_in_other_errors():
    assert "disk is full" in explain(RuntimeError("I/O error: No space left on device (os error 28)"))[0]


def test_ctrl_c_shows_how_to_continue(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert "again to resume" in error_lines(capsys)[-1]


def test_ctrl_c_that_a_library_swallows_still_ends_the_command(capsys):
    def interrupted():
        with contextlib.suppress(KeyboardInterrupt):  # as numpy and transformers do when interrupted in an import
            signal.raise_signal(signal.SIGINT)
        raise ModuleNotFoundError("Could not import module 'AutoModel'")

    assert run_command(interrupted) == 130
    assert "again to resume" in error_lines(capsys)[-1]
    with pytest.raises(KeyboardInterrupt):  # the handler is gone
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ModuleNotFoundError):
        run_command(interrupted, debug=True)


COMMANDS = ["prepare", "encode", "describe", "export-manifest", "push-dataset", "export", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert command in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom hf_csm.cli import build_parser\nbuild_parser()\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'datasets', 'pyarrow', 'numpy', 'moshi'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_doctor_lists_versions_and_free_disk_space(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch 2." in shown
    assert "moshi 0.2" in shown
    assert "GB free" in shown


def test_preparing_again_does_nothing(tmp_path, capsys):
    raw = write_ravdess(tmp_path / "raw", actors=(1,), emotions=("sad",), intensities=(1,), layout="actors")
    argv = ["prepare", "ravdess", "--raw", str(raw), "--out", str(tmp_path / "out"), "--num-workers", "1"]
    assert main(argv) == 0
    assert "nothing to do" not in capsys.readouterr().out
    assert main(argv) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--languages", "en", "zh"], {"languages": ("en", "zh")}),
        (["--corpus-name=mine"], {"corpus_name": ("mine",)}),
        (["--keep-unknown-speakers", "--test-sets", "Test1"], {"keep_unknown_speakers": (), "test_sets": ("Test1",)}),
    ],
)
def test_a_corpus_has_options_of_its_own(arguments, expected):
    assert corpus_options(arguments) == expected


@pytest.mark.parametrize("argument", ["--align_model", "--corpus", "--progress", "--num_workers=2", "stray"])
def test_a_corpus_option_cannot_replace_a_shared_option(argument):
    with pytest.raises(UserError, match=argument):
        corpus_options([argument, "x"])


def test_the_help_of_prepare_lists_every_corpus_with_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    shown = capsys.readouterr().out
    shared = {option.name for option in config_options(CorpusConfig)}
    for builder in all_builders():
        assert builder.NAME in shown
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [builder.NAME]] or [""]
        names = {option.name for option in config_options(builder.BUILDER_CONFIG_CLASS)} - shared
        assert {word[2:].replace("-", "_") for word in line.split() if word.startswith("--")} == names


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("0", "0"), ("abc", "2"), ("-1", "2")])
def test_an_impossible_rank_or_world_size_is_refused(rank, world_size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match=f"RANK is {rank} and WORLD_SIZE is {world_size}"):
        launched_as()


def test_an_unknown_option_of_a_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--languages", "en"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --languages en" in capsys.readouterr().err


def test_describe_prints_the_mixture_of_a_configuration_and_draws_it(codes, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset:\n  manifest_path: {codes}\n")
    picture = tmp_path / "mixture.png"
    assert main(["describe", str(config), "--out", str(picture), "--dataset.balance.temperature", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("25.0%") == 4
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_plan_prints_shell_assignments_for_the_workflow_script(tmp_path, capsys):
    (tmp_path / "codes" / "ravdess").mkdir(parents=True)
    config = tmp_path / "run.yaml"
    paths = [str(tmp_path / "codes" / "ravdess"), str(tmp_path / "codes" / "esd"), "user/hub"]
    sources = [{"path": path, "weight": 1.0, "revision": None} for path in paths]
    config.write_text(json.dumps({"run_dir": f"{tmp_path}/my run", "dataset": {"sources": sources}}))
    assert main(["plan", str(config), "--training.max_steps", "7"]) == 0
    script = (
        capsys.readouterr().out
        + 'printf "%s\\n" "$run_dir" "$last_checkpoint" "$mixture" "$trained_mixture" "${missing[@]}"'
    )
    shown = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[:2] == [f"{tmp_path}/my run", f"{tmp_path}/my run/checkpoint_000007"]
    assert json.loads(shown[2]) == [sources[0], sources[2]]
    assert shown[3:] == ["", paths[1]]

    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.yaml").write_text(json.dumps({"dataset": {"sources": sources[:1]}}))
    assert main(["plan", str(config)]) == 0
    assert f"trained_mixture='{json.dumps(sources[:1])}'" in capsys.readouterr().out


def test_a_manifest_is_exported_and_encoded(prepared, tiny_moshi, tmp_path, capsys):
    folder = tmp_path / "manifest"
    assert main(["export-manifest", str(prepared), "--out", str(folder), "--duration-sec", "8"]) == 0
    command = ["encode", str(folder / "test.jsonl"), "--out", str(tmp_path / "codes"), "--base-model", str(tiny_moshi)]
    assert main([*command, "--label", "perceived"]) == 1
    assert "--label and --variants do not apply" in capsys.readouterr().err
    assert main(command) == 0
    assert "happy" in capsys.readouterr().out
    assert (tmp_path / "codes" / "README.md").is_file()


BAD_INPUTS = {
    "unknown corpus": ("prepare ravdes --raw {here}", "ravdess"),
    "missing folder": ("prepare ravdess --raw {here}/nowhere", "nowhere"),
    "empty folder": ("prepare ravdess --raw {here}/empty", "empty"),
    "unknown subset": ("prepare ravdess --raw {here} --subsets talk", "talk"),
    "another corpus": ("prepare esd --raw {here}/crema_d", "looks like CREMA-D"),
    "a corpus behind a form": ("prepare msp_podcast", "MSP-Podcast cannot be downloaded"),
    "an option of another corpus": ("prepare ravdess --raw {here} --languages en", "no option 'languages'"),
    "no workers": ("prepare ravdess --raw {here} --num-workers -3", "-3"),
    "not prepared": ("encode {here}/empty --base-model {base}", "empty"),
    "codes encoded again": ("encode {codes} --base-model {base}", "not a prepared"),
    "manifest of nothing": ("encode {here}/x.jsonl --base-model {base}", "x.jsonl"),
    "no perceived labels": ("encode {prepared} --base-model {base} --label perceived", "perceived"),
    "missing base": ("encode {prepared} --base-model {here}/no", "no"),
    "base without tokenizer": ("encode {prepared} --base-model {here}/base", "tokenizer"),
    "no variants": ("encode {prepared} --base-model {base} --variants 0", "0"),
    "unknown device": ("encode {prepared} --base-model {base} --device tpu9", "tpu9"),
    "a device that computes nothing": ("encode {prepared} --base-model {base} --device meta", "meta"),
    "range the wrong way": ("encode {prepared} --base-model {base} --lead-in-s 2 1", "2 to 1"),
    "conversations too short": ("encode {prepared} --base-model {base} --duration-sec 2", "2 seconds"),
    "no batch": ("encode {prepared} --base-model {base} --batch-sec -1", "-1"),
    "out cannot be made": ("encode {prepared} --base-model {base} --out /proc/nowhere/codes", "/proc/nowhere"),
    "no table to export": ("export-manifest {here}/nowhere", "nowhere"),
    "no checkpoint": ("export {here}/empty", "empty"),
    "nothing to publish": ("push-dataset {here}/empty --repo-id ann/x", "empty"),
    "no configuration": ("describe {here}/no.yaml", "no.yaml"),
}


@pytest.mark.parametrize(("command", "key_term"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_ends_with_two_lines_that_name_it(command, key_term, tmp_path, prepared, codes, tiny_moshi, capsys):
    for folder in ("empty", "base", "crema_d"):
        (tmp_path / folder).mkdir()
    (tmp_path / "crema_d" / "1001_DFA_ANG_XX.wav").touch()
    for path in tiny_moshi.iterdir():
        if "tokenizer" not in path.name:
            (tmp_path / "base" / path.name).symlink_to(path)
    argv = command.format(here=tmp_path, prepared=prepared, codes=codes, base=tiny_moshi).split()
    if argv[0] in ("prepare", "encode", "export-manifest", "export") and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    assert main(argv) == 1
    lines = [line for line in error_lines(capsys) if "it/s" not in line and "s/s" not in line]
    assert len(lines) == 2, lines
    assert lines[0].startswith("error: ")
    assert key_term in lines[0]
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("option", ["data-dir", "name", "corpus"])
def test_an_option_named_like_a_parameter_of_prepare_is_an_unknown_option(tmp_path, option, capsys):
    (tmp_path / "raw").mkdir()
    command = ["prepare", "ravdess", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert main([*command, f"--{option}", "x"]) == 1
    problem, _ = capsys.readouterr().err.splitlines()
    assert option.replace("-", "_") in problem
