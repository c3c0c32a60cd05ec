"""Model families behind one record of functions, `family.Family`."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_csm.models.family import Family

FAMILIES = {"moshi": "hf_csm.models.moshi:MOSHI"}
"""Import path of the record of each family, by `model_type` of config.json; importing one is slow."""
DEFAULT_FAMILY = "moshi"
"""Repositories with Moshi's architecture may have no config.json, or another `model_type` in it."""


def get_family(name_or_folder: str | Path, revision: str | None = None) -> Family:
    """Return the family of a model: a folder, a training checkpoint, or a repository on the Hub.

    Raises:
        UserError: there is no such model, or its config.json cannot be read.
    """
    from hf_csm.files import read_json
    from hf_csm.hub import CONFIG_NAME, find_model

    folder = find_model(name_or_folder, revision)
    paths = [folder / CONFIG_NAME, folder / "consolidated" / CONFIG_NAME]
    config = next((read_json(path, "Copy it again from its source.") for path in paths if path.is_file()), {})
    return pkgutil.resolve_name(FAMILIES.get(str(config.get("model_type")), FAMILIES[DEFAULT_FAMILY]))
