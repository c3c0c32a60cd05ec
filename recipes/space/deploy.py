"""Deploy the Gradio app with its sources to a Space, or update a Space deployed before.

python recipes/space/deploy.py USER/SPACE --model USER/ADAPTER --private

Uses the token of `hf auth login` or HF_TOKEN and does not store it. Choose the hardware in the settings of the Space.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_csm.cli import run_command
from hf_csm.errors import UserError
from hf_csm.hub import hub_errors


SPACE = Path(__file__).parent
ROOT = SPACE.parent.parent
APP_FILES = ("app.py", "README.md", "requirements.txt")
PACKAGES = ("hf_csm", "dataset_builders")
MARK = "hf_csm/__init__.py"
"""File that identifies a Space deployed by this script."""


def deploy(repo_id: str, models: Sequence[str], *, private: bool = False, revision: str | None = None) -> str:
    """Set the variables of the Space, upload the app in one commit, and return the URL of the Space.

    Args:
        repo_id: `user/name` of the Space; created if missing.
        models: repositories on the Hub, for `HF_CSM_MODEL`.
        private: create a private Space; an existing one must be private.
        revision: of the single model, for `HF_CSM_REVISION`.

    Raises:
        UserError: the Space has other content, a model is not on the Hub, or the token has no write access.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    for name in (repo_id, *models):
        if name.count("/") != 1 or name.startswith(("/", ".", "~")):
            raise UserError(f"{name!r} is not the name of a Hub repository.", "Use USER/NAME, as in ann/moshi-happy.")
    if revision is not None and len(models) > 1:
        raise UserError(
            f"--revision {revision} is ambiguous with {len(models)} models.", "Use it with a single model."
        )
    if get_token() is None:
        raise UserError(
            f"{repo_id}: you are not logged in to the Hub.",
            "Run `hf auth login` with a token with write access, or set HF_TOKEN.",
        )
    api = HfApi()
    shown = list(models)
    for model in models:
        with hub_errors(f"{model}: "):
            card = api.model_info(model, revision=revision).card_data
        base = card.get("base_model") if card else None
        shown += [base] if isinstance(base, str) else base or []
    files = space_files(list(dict.fromkeys(shown)))
    with hub_errors(f"{repo_id}: "):
        present = _open_space(api, repo_id, private)
        # Before the upload, which starts the app.
        wanted = {"HF_CSM_MODEL": shlex.join(models), "HF_CSM_REVISION": revision}
        known = api.get_space_variables(repo_id)
        for key, value in wanted.items():
            if value is not None:
                api.add_space_variable(repo_id, key, value)
            elif key in known:
                api.delete_space_variable(repo_id, key)
        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
        stale = [path for path in present if path.split("/")[0] in PACKAGES and path not in files]
        operations += [CommitOperationDelete(path) for path in stale]
        api.create_commit(repo_id, operations, commit_message="Deploy hf-csm's app", repo_type="space")
    return f"{api.endpoint}/spaces/{repo_id}"


def space_files(models: Sequence[str]) -> dict[str, bytes]:
    """Return path and content of the files of the Space; its README links to `models`."""
    files = {name: (SPACE / name).read_bytes() for name in APP_FILES}
    _, front, text = files["README.md"].decode().split("---\n", 2)
    front = yaml.safe_dump(yaml.safe_load(front) | {"models": list(models)}, sort_keys=False, allow_unicode=True)
    files["README.md"] = f"---\n{front}---\n{text}".encode()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            name = path.relative_to(ROOT)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
                files[name.as_posix()] = path.read_bytes()
    return files


def _open_space(api: Any, repo_id: str, private: bool) -> list[str]:
    """Create the Space if missing, and return the names of its files."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private)
        info = api.space_info(repo_id)
    if private and not info.private:
        raise UserError(
            f"{repo_id}: exists and is public.", "Make it private in its settings, or choose another name."
        )
    present = [sibling.rfilename for sibling in info.siblings]
    is_new = set(present) <= {".gitattributes", "README.md"} and _has_default_readme(api, repo_id, present)
    if MARK not in present and not is_new:
        raise UserError(
            f"{repo_id}: the Space exists and has other content.", "Choose another name. Nothing was changed."
        )
    return present


def _has_default_readme(api: Any, repo_id: str, present: Sequence[str]) -> bool:
    """Whether the README of a Space is missing or generated by the Hub."""
    if "README.md" not in present:
        return True
    text = Path(api.hf_hub_download(repo_id, "README.md", repo_type="space")).read_text(encoding="utf-8")
    body = text.split("---\n", 2)[-1].strip()
    return not body or body.startswith("Check out the configuration reference at")


def main(argv: Sequence[str]) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", metavar="USER/SPACE", help="created if missing")
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="USER/ADAPTER", help="adapters of one base, or a merged model"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model (default: main)")
    parser.add_argument("--private", action="store_true", help="create a private Space")
    options = parser.parse_args(argv)
    url = deploy(options.space, options.model, private=options.private, revision=options.revision)
    print(f"{url} is building. Choose its hardware in the settings; for a private adapter add a secret HF_TOKEN.")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
