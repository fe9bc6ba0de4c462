"""The errors users see: what is wrong, where in their source, and what to do about it."""

from typing import Self


class _Located(ValueError):
    """An error whose whole text is composed once: what, where, graph excerpt, rule, help."""

    kind = "error"

    def __init__(self, what: str, *, where: str = "", excerpt: str = "", rule: str = "", help: str = "") -> None:
        self.what, self.where, self.excerpt, self.rule, self.help = what, where, excerpt, rule, help
        lines = [f"{self.kind}: {what}"]
        if where:
            lines.append(f"  --> {where}")
        lines += [f"   | {line}" for line in excerpt.splitlines()]
        if rule:
            lines.append(f"   |   rule: {rule}")
        if help:
            lines.append(f"   = help: {help}")
        super().__init__("\n".join(lines))

    def at(self, where: str) -> Self:
        """The same error, pointing at a line if it does not yet."""
        if self.where:
            return self
        return type(self)(self.what, where=where, excerpt=self.excerpt, rule=self.rule, help=self.help)


class ShardingError(_Located):
    """The program cannot be sharded as asked."""

    kind = "sharding error"


class PlanError(_Located):
    """The plan, or an option of compile, does not make sense for this module and mesh."""

    kind = "plan error"


class CheckpointError(_Located):
    """A file of weights, or a state_dict, is damaged or does not fit the model."""

    kind = "checkpoint error"


class RankMismatchError(RuntimeError):
    """Ranks disagree: on the program, on the plan, on the sizes of their inputs, or on what they call when."""

    together = False  # whether all ranks raise it, of one comparison


class RankFailure(RuntimeError):
    """A rank failed; the message carries its number and its traceback."""
