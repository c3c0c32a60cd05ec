"""The exception for errors that a user can fix."""

from __future__ import annotations

import importlib.util


class UserError(ValueError):
    """An error that the user can fix, printed as two lines: the problem and the remedy.

    Args:
        problem: one line that names the offending input and its value.
        remedy: one line with what to do about it.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self):  # can be pickled, to come back from a worker process
        return type(self), (self.problem, self.remedy)


def require_extra(extra: str, feature: str, *modules: str) -> None:
    """Check that the modules of an optional dependency group are installed.

    Raises:
        UserError: one is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{feature} needs {module}.", f"Install it with: pip install 'hf-csm[{extra}]'")
