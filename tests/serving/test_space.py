"""The Gradio Space: its functions, its deployment, and the deployed folder as a program."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from hf_csm.errors import UserError
from hf_csm.serving import speech as offline
from hf_csm.units import SAMPLE_RATE
from tests.doubles.hub import LocalHub


SPACE = Path(__file__).parents[2] / "recipes" / "space"
SPACE_ID = "user/moody-space"
MODEL_ID = "user/moody"


def module(name):
    spec = importlib.util.spec_from_file_location(f"space_{name}", SPACE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def app():
    return module("app")


@pytest.fixture(scope="module")
def demo(app, expressive):
    return app.Demo({"HF_CSM_MODEL": str(expressive), "HF_CSM_DEVICE": "cpu", "HF_CSM_SECONDS": "0.3"})


@pytest.fixture(autouse=True)
def short_ends(monkeypatch):
    monkeypatch.setattr(offline, "MAX_FADING_S", 0.24)


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    path = tmp_path_factory.mktemp("question") / "q.wav"
    soundfile.write(path, 0.2 * np.ones(4800), 16_000)
    return str(path)


def test_adapter_and_base_answer_the_same_question(app, demo, question):
    assert demo.emotions == ["happy", "sad", "angry"]
    adapted, base = demo.ask("sad", question, 1.0, 3)
    assert [(speech.adapter, speech.emotion, speech.seed) for speech in (adapted, base)] == [
        ("expressive", "sad", 3),
        ("base", None, 3),
    ]
    assert np.array_equal(adapted.user[:32000], base.user[:32000])
    sample_rate, samples = app.sound(adapted)
    assert (sample_rate, samples.dtype) == (SAMPLE_RATE, np.int16)
    after = adapted.audio[round(1.34 * SAMPLE_RATE) :]  # after 1.04 s come 4,800 samples of 16 kHz
    assert np.abs(samples / 32768 - np.clip(after, -1, 1)).max() < 1e-4
    # The base model is run once for all emotions; an adapter with strength 0 equals it, without a prefix.
    weak, same = demo.ask(None, question, 0.0, 3)
    assert same is base
    assert np.array_equal(weak.audio, base.audio)


def test_adapter_and_base_speak_a_text(demo):
    adapted, base = demo.say("happy", "no", 1.0, None)
    assert adapted.text == base.text == "no"
    assert adapted.emotion == "happy"


@pytest.mark.parametrize(
    ("path", "seed", "problem"),
    [(None, 0, "No question"), ("long", 0, "31 seconds long"), ("good", -1, "seed is -1"), ("good", 0.5, "0.5")],
)
def test_invalid_questions_are_refused(demo, question, tmp_path, path, seed, problem):
    if path == "long":
        path = str(tmp_path / "long.wav")
        soundfile.write(path, np.zeros(31 * 8000), 8000)
    with pytest.raises(UserError, match=problem):
        list(demo.ask("sad", question if path == "good" else path, 1.0, seed))


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, "No model is set"),
        ({"HF_CSM_MODEL": "x/y", "HF_CSM_SECONDS": "long"}, "HF_CSM_SECONDS is 'long'"),
        ({"HF_CSM_MODEL": "x/y"}, "has no GPU"),
        ({"HF_CSM_MODEL": "x/y", "HF_CSM_DEVICE": "cpu"}, "x/y"),
    ],
)
def test_invalid_environments_are_reported(app, monkeypatch, environment, problem):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=problem):
        app.Demo(environment)


def test_requirements_match_the_package():
    pyproject = (SPACE.parents[1] / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = (\[.*?^\])", pyproject, re.DOTALL | re.MULTILINE)[1]
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ast.literal_eval(listed)


def test_readme_has_the_tested_gradio_version():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n", 2)[1])
    version = importlib.metadata.version("gradio")
    assert (front["sdk"], front["sdk_version"], front["app_file"]) == ("gradio", version, "app.py")


@pytest.fixture(scope="module")
def hub(tmp_path_factory, expressive):
    folder = tmp_path_factory.mktemp("hub")
    with LocalHub(folder / "hub") as hub, hub.connected(folder / "home"):
        api = HfApi()
        api.create_repo(MODEL_ID, private=True)
        (folder / "model").mkdir()
        (folder / "model" / "README.md").write_text("---\nbase_model: kyutai/tiny\n---\n")
        api.upload_folder(repo_id=MODEL_ID, folder_path=folder / "model")
        yield hub


@pytest.fixture(scope="module")
def deployed(hub):
    deploy = module("deploy")
    assert deploy.deploy(SPACE_ID, [MODEL_ID], private=True, revision="main") == f"{hub.endpoint}/spaces/{SPACE_ID}"
    return deploy


def test_deploy_creates_a_space_with_its_model(deployed, hub):
    info = HfApi().space_info(SPACE_ID)
    assert info.private
    assert info.card_data["models"] == [MODEL_ID, "kyutai/tiny"]
    assert info.card_data["app_file"] == "app.py"
    names = {sibling.rfilename for sibling in info.siblings}
    assert {"app.py", "requirements.txt", "hf_csm/serving/speech.py", "dataset_builders/ravdess.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "recipes"))]
    assert hub.repositories[f"spaces/{SPACE_ID}"].variables == {"HF_CSM_MODEL": MODEL_ID, "HF_CSM_REVISION": "main"}


def test_deploying_again_updates_the_space(deployed, hub):
    HfApi().upload_file(path_or_fileobj=b"old", path_in_repo="hf_csm/gone.py", repo_id=SPACE_ID, repo_type="space")
    deployed.deploy(SPACE_ID, [MODEL_ID])
    assert "hf_csm/gone.py" not in HfApi().list_repo_files(SPACE_ID, repo_type="space")
    assert hub.repositories[f"spaces/{SPACE_ID}"].variables == {"HF_CSM_MODEL": MODEL_ID}


@pytest.mark.parametrize("ours", [False, True])
def test_space_with_its_own_readme_is_kept(deployed, ours):
    api = HfApi()
    api.create_repo(f"user/page-{ours}", repo_type="space", space_sdk="static")
    text = "Check out the configuration reference at https://huggingface.co" if ours else "# My page"
    page = f"---\nsdk: static\n---\n\n{text}\n".encode()
    api.upload_file(path_or_fileobj=page, path_in_repo="README.md", repo_id=f"user/page-{ours}", repo_type="space")
    if ours:
        deployed.deploy(f"user/page-{ours}", [MODEL_ID])
    else:
        with pytest.raises(UserError, match="other content"):
            deployed.deploy(f"user/page-{ours}", [MODEL_ID])


def test_space_with_other_content_is_kept(deployed):
    api = HfApi()
    api.create_repo("user/game", repo_type="space", space_sdk="static")
    api.upload_file(path_or_fileobj=b"play", path_in_repo="index.html", repo_id="user/game", repo_type="space")
    with pytest.raises(UserError, match="other content"):
        deployed.deploy("user/game", [MODEL_ID])
    with pytest.raises(UserError, match="is public"):
        deployed.deploy("user/game", [MODEL_ID], private=True)
    assert "hf_csm/__init__.py" not in api.list_repo_files("user/game", repo_type="space")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((SPACE_ID, ["adapters/happy/x"]), "adapters/happy/x"),
        ((SPACE_ID, ["./happy"]), "./happy"),
        (("space", [MODEL_ID]), "'space'"),
        (("user/new", ["user/nobody"]), "user/nobody: the Hub has no such repository"),
        (("other/new", [MODEL_ID]), "other/new: your token may not do this"),
    ],
)
def test_invalid_deployments_create_nothing(deployed, arguments, problem):
    with pytest.raises(UserError, match=problem):
        deployed.deploy(*arguments)
    if arguments[0] != SPACE_ID and "/" in arguments[0]:
        with pytest.raises(RepositoryNotFoundError):
            HfApi().space_info(arguments[0])


def test_revision_requires_one_model_and_deploying_a_token(deployed, hub, monkeypatch):
    with pytest.raises(UserError, match="2 models"):
        deployed.deploy(SPACE_ID, [MODEL_ID, MODEL_ID], revision="v1")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="not logged in"):
        deployed.deploy(SPACE_ID, [MODEL_ID])


def test_only_sources_are_uploaded(monkeypatch, tmp_path):
    deploy = module("deploy")
    for name in ("hf_csm/a.py", "hf_csm/page/b.html", "hf_csm/__pycache__/a.pyc", "dataset_builders/.secret", "c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(deploy, "ROOT", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    deploy.write_space(out, [])
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "README.md",
        "app.py",
        "hf_csm/a.py",
        "hf_csm/page/b.html",
        "requirements.txt",
    ]


CLIENT = """
import os, socket, sys, torch
torch.set_num_threads(1)
import app
from gradio_client import Client, handle_file
import hf_csm, dataset_builders
for package in (hf_csm, dataset_builders):
    assert os.path.realpath(list(package.__path__)[0]).startswith(os.path.realpath(os.getcwd())), package
from hf_csm.serving import speech as offline
offline.MAX_FADING_S = 0.24
page = app.build_app()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
client = Client(page.local_url, verbose=False)
sound, text, base_sound, base_text = client.predict("hello", 1.0, 0, api_name="/say_happy")
assert text == base_text == "hello", (text, base_text)
answer, text, base_answer, base_text = client.predict(handle_file(sys.argv[1]), 1.0, 0, api_name="/ask_sad")
assert os.path.getsize(answer) > 44 and os.path.getsize(base_answer) > 44
try:
    client.predict(None, 1.0, 0, api_name="/ask_plain")
except Exception as error:
    assert "No question." in str(error), error
else:
    raise AssertionError("no error")
page.close()
print("answered")
"""


@pytest.mark.slow
def test_deployed_folder_runs_on_its_own(deployed, expressive, question, tmp_path):
    folder = snapshot_download(SPACE_ID, repo_type="space", local_dir=tmp_path / "space")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_CSM_MODEL": str(expressive), "HF_CSM_DEVICE": "cpu", "HF_CSM_SECONDS": "0.3"}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(tmp_path)}
    (Path(folder) / "client.py").write_text(CLIENT)
    result = subprocess.run(
        [sys.executable, "client.py", question],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "answered"
