"""A calculator for models: it works out an expression's tree itself, and runs no code."""

import ast
import math
import operator
from collections.abc import Callable

LONGEST = 200  # characters of an expression
LARGEST = 10**100  # of all numbers on the way, so that nothing takes time
MOST_DIGITS = 100  # that `round` gets
TYPED = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")"})

Number = int | float

OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
SIGNS: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _round(number: Number, digits: Number = 0) -> Number:
    """`round`, of which very many digits would take time."""
    if abs(digits) > MOST_DIGITS:
        raise ValueError("too many digits to round to")
    return round(number, digits)


FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "round": _round,
    "sqrt": math.sqrt,
}


def calculator(expression: str) -> str:
    """Work out an expression of numbers, + - * / // % **, parentheses and FUNCTIONS.

    Whole numbers stay exact; others have 12 digits. Raises ValueError for anything else, numbers
    beyond LARGEST, and what has no value.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression of more than {LONGEST} characters")
    try:
        plain = expression.translate(TYPED).strip().rstrip("= ")
        value = _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not an expression of numbers") from None
    except (ArithmeticError, TypeError) as error:
        raise ValueError(str(error)) from None
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e15):
        return f"{value:.12g}"
    return str(int(value))


def _value(node: ast.expr) -> Number:
    """The value of a part of the tree."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
            value = SIGNS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow):
                _check_power(first, second)
            value = OPERATORS[type(op)](first, second)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            value = FUNCTIONS[name](*map(_value, arguments))
        case _:
            raise ValueError("not an expression of numbers")
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError("a number that is too large, or none")
    return value


def _check_power(base: Number, exponent: Number) -> None:
    """Raise ValueError before a power is worked out that would be too large."""
    if abs(base) > 1 and exponent * math.log10(abs(base)) > math.log10(LARGEST):
        raise ValueError("a power that is too large")
