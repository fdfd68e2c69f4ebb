"""The tools that conversations of the sample world offer.

Their schemas are short, because every conversation that offers a tool begins with its schema.
"""

from typing import Any

CALCULATOR, CLOCK = "calculator", "clock"
# What conversations offer, in equal shares: a clock alone does not add, nor a calculator tell time.
OFFERS = [
    *([(CALCULATOR,)] * 3),
    *((CALCULATOR, CLOCK), (CLOCK, CALCULATOR)),
    (CLOCK,),
]


def _schema(name: str, *arguments: str) -> dict[str, Any]:
    """The JSON schema of a function that takes these arguments, all of them strings."""
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = {CALCULATOR: _schema(CALCULATOR, "expression"), CLOCK: _schema(CLOCK)}
