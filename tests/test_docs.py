"""README and docs agree with the code: commands, options, paths and Python blocks."""

import dataclasses
import importlib.util
import json
import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest
from aiohttp import WSCloseCode

from hf_csm.cli import build_parser
from hf_csm.commands.data import corpus_options
from hf_csm.config import DatasetConfig, Replay, RunConfig, Source
from hf_csm.config_parser import GUIDE_KEYS, parse_run_config
from hf_csm.corpora import all_builders
from hf_csm.prepare.builder import config_options
from hf_csm.prepare.run import prepare
from hf_csm.serving.server.limits import Limits
from hf_csm.testing.ravdess import write_ravdess


ROOT = Path(__file__).parent.parent
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, ROOT / "recipes/benchmarks/results.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("hf_csm", "dataset_builders", "recipes", "accelerate_configs", "tests", "docs", ".ci")
OPTIONS_OF_LAUNCHERS = {"--quiet", "--config_file", "--machine_rank", "--nproc-per-node"}


def blocks(page, language):
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text(encoding="utf-8")))


def commands(page):
    """Return the words of each command line in the shell blocks and in inline code."""
    lines = [line for code in blocks(page, "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += [code for code in inline_code(page) if re.match(r"(hf-csm|python|make|recipes/\S+\.sh) ", code)]
    for line in lines:
        for part in line.split(" && "):
            words = shlex.split(part.partition(" #")[0])
            while words and re.fullmatch(r"\w+=\S*", words[0]):  # environment variables
                words = words[1:]
            if words:
                yield words


def check_corpus_options(corpus, arguments):
    builder = next(builder for builder in all_builders() if corpus == builder.NAME)
    known = {option.name for option in config_options(builder.BUILDER_CONFIG_CLASS)}
    assert set(corpus_options(arguments)) <= known


def check_hf_csm(words):
    if len(words) == 1 or words[1].startswith("[") or not set(words[1:]) - {"--version", "--help"}:
        return
    if len(words) == 2 or "|" in words[-1]:  # a command that is only mentioned
        assert words[1] in subcommands()
        return
    parser = build_parser()
    options, more = parser.parse_known_args(words[1:])  # an unknown command or option ends in SystemExit
    assert options.takes_more or not more
    if words[1] == "prepare":
        check_corpus_options(options.corpus, more)
    elif more:
        parse_run_config(["--config", options.config, *more])


def check(words):
    """Check one command line, as far as the programs are part of the project or moshi's."""
    for word in words:
        if word.split("/")[0] in FOLDERS and "/" in word:
            assert (ROOT / word).exists(), f"{word} does not exist"
    if words[0] == "hf-csm":
        check_hf_csm(words)
    elif "hf_csm.cli" in words:
        check_hf_csm(words[words.index("hf_csm.cli") :])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif words[0].endswith("run_expressive_finetuning.sh"):
        own, training = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        text = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(f"        {word})" in text for word in own if word.startswith("--"))
        parse_run_config(["--config", "recipes/configs/demo.yaml", *training])
    elif "recipes/train.py" in words:
        arguments = words[words.index("recipes/train.py") + 1 :]
        if arguments != ["--help"]:
            parse_run_config(arguments)
    elif words[0] == "python":
        source = moshi_file("server.py") if words[1:3] == ["-m", "moshi.server"] else ROOT / words[1]
        text = source.read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))


def moshi_file(name):
    (folder,) = importlib.util.find_spec("moshi").submodule_search_locations
    return Path(folder, name)


def subcommands():
    (actions,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    return actions.choices


def config_keys(options=None, prefix=""):
    if options is None:
        dataset = DatasetConfig(sources=[Source("codes")], replay=Replay("codes", 0.1))
        options = dataclasses.asdict(RunConfig(dataset=dataset))
        options["dataset"]["sources"] = options["dataset"]["sources"][0]
    for name, value in options.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from config_keys(value, f"{prefix}{name}.")


def known_options():
    """Return every `--option` of the commands, the corpora, the recipes, the training and moshi's server."""
    options = {option for parser in subcommands().values() for option in parser._option_string_actions}
    options |= {f"--{key}" for key in config_keys()} | OPTIONS_OF_LAUNCHERS | {"--resume-from-checkpoint"}
    for builder in all_builders():
        options |= {"--" + option.name.replace("_", "-") for option in config_options(builder.BUILDER_CONFIG_CLASS)}
    for file in (*(ROOT / "recipes").rglob("*.py"), *(ROOT / "recipes").glob("*.sh"), moshi_file("server.py")):
        options |= set(re.findall(r"--[a-z][\w-]+", file.read_text(encoding="utf-8")))
    return options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_can_be_parsed(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_exist(page):
    known = known_options()
    keys = {*config_keys(), *GUIDE_KEYS}
    groups = {key.split(".")[0] for key in keys if "." in key}
    for code in inline_code(page):
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known, f"{page.name}: {code}"
        name = code.partition(":")[0]
        is_file = name.endswith((".safetensors", ".yaml", ".png"))
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name.split(".")[0] in groups and not is_file:
            assert name in keys, f"{page.name}: {name} is not an option"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_paths_and_names_exist(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
    for code in inline_code(page):
        if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", code):
            assert (ROOT / code).exists(), f"{page.name}: {code}"
        elif re.fullmatch(r"hf_csm(\.\w+)+", code):
            pkgutil.resolve_name(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_and_json_blocks_are_valid(page, tmp_path):
    for code in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(code, encoding="utf-8")
        parse_run_config(["--config", str(tmp_path / "run.yaml")])
    for code in blocks(page, "json"):
        json.loads(code)


def test_every_command_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in MANUAL)
    assert [name for name in subcommands() if f"hf-csm {name}" not in text] == []


def test_documented_paths_codes_and_limits_are_those_of_the_server():
    """Paths, status codes, close codes and limits in docs/serving.md."""
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    server = ROOT / "hf_csm/serving/server"
    paths, codes = (text.split(title)[1].split("\n\n")[1] for title in ("## HTTP", "Close codes:"))
    routes = re.findall(r'add_get\("([^"{]+)', (server / "app.py").read_text(encoding="utf-8"))
    assert sorted(re.findall(r"^\| `(/\S*)` \|", paths, re.MULTILINE)) == sorted(routes)
    statuses = re.findall(r"(?:_error\(|status=)\s*(\d{3})\b", (server / "app.py").read_text(encoding="utf-8"))
    http = text.split("## HTTP")[1].split("\n## ")[0]
    assert set(re.findall(r"\b[1-5]\d\d\b", http)) == {"200", *statuses}
    names = set(re.findall(r"WSCloseCode\.(\w+)", (server / "session.py").read_text(encoding="utf-8"))) - {"OK"}
    assert {int(code) for code in re.findall(r"\b1\d{3}\b", codes)} == {WSCloseCode[name] for name in names}
    limits = Limits()
    for sentence in (
        f"{limits.max_message_bytes // 1024} KB per message",
        f"JSON message of more than {limits.max_control_bytes:,} characters",
        f"{limits.messages_per_s:g} messages per second without audio ({limits.messages_burst:,} in a burst)",
        f"{limits.max_backlog_s:g} s of received audio",
        f"{limits.max_unsent_s:g} s of sent audio",
        f"{limits.idle_s:g} s without audio",
        f"{limits.heartbeat_s / 2:g} s to answer a ping, which follows {limits.heartbeat_s:g} s without a message",
        f"{limits.max_connections} connections",
        f"longest conversation, {limits.max_conversation_s / 60:g} by default",
    ):
        assert sentence in " ".join(text.split()), sentence


def test_readme_is_a_landing_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    for page in MANUAL[1:]:
        assert f"(docs/{page.name})" in readme


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A folder with the tables that the Python blocks name; the second is a copy of the first."""
    folder = tmp_path_factory.mktemp("miniature")
    few = {"emotions": ["happy", "sad"], "statements": [1], "repetitions": [1], "intensities": [1]}
    raw = write_ravdess(folder / "raw" / "ravdess", actors=[1, 17, 21], **few)
    prepare("ravdess", raw, folder / "prepared" / "ravdess", num_workers=1, progress=False)
    shutil.copytree(folder / "prepared" / "ravdess", folder / "prepared" / "crema_d")
    return folder


PYTHON = [(page, number) for page in MANUAL for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), PYTHON, ids=lambda value: getattr(value, "stem", value))
def test_python_blocks_run(page, number, miniature, tmp_path, monkeypatch):
    shutil.copytree(miniature, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = {}
    exec(compile(blocks(page, "python")[number], f"{page.name}:{number}", "exec"), names)
    if "samples" in names:
        assert names["samples"].dtype == "float32"
    if "row" in names:
        assert names["row"]["corpus"] == "ravdess"
    if names.get("emotion"):
        assert names["emotion"] in ("happy", "sad")
