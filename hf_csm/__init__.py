"""hf-csm: teach conversational speech models to speak with emotion, measure whether it worked, serve the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_csm.corpora import load_corpus
    from hf_csm.mixture.interleave import interleave_corpora

__version__ = "0.1.0"
__all__ = ["__version__", "interleave_corpora", "load_corpus"]


def __getattr__(name: str) -> Any:
    # `datasets` takes seconds to import, and `hf-csm --help` must answer at once.
    if name == "load_corpus":
        from hf_csm.corpora import load_corpus

        return load_corpus
    if name == "interleave_corpora":
        from hf_csm.mixture.interleave import interleave_corpora

        return interleave_corpora
    raise AttributeError(f"module 'hf_csm' has no attribute {name!r}")
