"""Numbers and times as a person reads them."""

from .language import Text


def format_number(number: float) -> str:
    """Three to five digits and a unit: 25,829,888 → "25.83 M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return Text("{number:.2f} {unit}", number=number / size, unit=unit)
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 4,805 → "1:20:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
