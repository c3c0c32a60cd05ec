"""What the stand-in Hub says of a card's metadata: the lists of sizes and, in terms.py, licences are the Hub's."""

from __future__ import annotations

import re
from typing import Any

import yaml

from hf_csm.mixture.provenance import LANGUAGE, LICENSES


_SIZES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"),
    *("10B<n<100B", "100B<n<1T", "n>1T"),
)


def front_matter(card: str) -> Any:
    """Return the metadata of a card; `None` if it has none.

    Raises:
        yaml.YAMLError: it has some that is not YAML.
    """
    match = re.match(r"---\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) if match else None


def card_problems(card: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Return the errors and warnings of a card's metadata, the fields checked of which there are closed lists."""
    try:
        metadata = front_matter(card)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {str(error).splitlines()[0]}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["The metadata has to be a mapping."], []
    checks: dict[str, tuple[str, Any]] = {
        "license": (f"must be one of [{', '.join(sorted(LICENSES))}]", lambda value: value in LICENSES),
        "language": (
            "must be an ISO 639-1, 639-2 or 639-3 code",
            lambda value: LANGUAGE.fullmatch(str(value)),
        ),
        "tags": ("must be strings", lambda value: isinstance(value, str)),
        "pretty_name": ("must be a string", lambda value: isinstance(value, str)),
    }
    if repo_type == "dataset":
        checks["size_categories"] = (f"must be one of [{', '.join(_SIZES)}]", lambda value: value in _SIZES)
        checks["configs"] = ("must have a config_name", lambda value: "config_name" in value)
    errors = []
    for name, (rule, is_valid) in checks.items():
        values = metadata.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not is_valid(value):
                errors.append(f'"{name}" {rule}, not {value!r}')
    return errors, []
