"""An optional extra: what is imported from it is Any, whether it is installed or not."""

from typing import Any

def __getattr__(name: str) -> Any: ...
