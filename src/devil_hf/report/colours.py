"""The colours of figures and pages, in one place; the scales of maps are in `overlays`."""

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (24, 27, 33)
MUTED: Colour = (104, 111, 122)
RULE: Colour = (222, 225, 230)
VEIL = (12, 14, 18, 165)  # over a picture, so that words on it can be read
TRUTH: Colour = (0, 150, 90)  # outlines of what is known to be there
HEAT: tuple[Colour, Colour] = (
    (246, 248, 251),
    (24, 78, 148),
)  # one hue, light to dark, so that it reads in grey as well
WARM, COOL = (240, 130, 40), (63, 142, 206)  # of the maps' own diverging scale
FULL_TINT = 2.0  # nats at which a word has its full colour


def tint(nats: float) -> str:
    """CSS colour behind a word: warm for evidence of the features, cool for words that they speak against."""
    red, green, blue = WARM if nats > 0 else COOL
    return f"rgba({red}, {green}, {blue}, {0.65 * min(abs(nats) / FULL_TINT, 1.0):.2f})"


def heat(share: float) -> Colour:
    """The colour of a share in [0, 1]."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(*HEAT, strict=True))
    return red, green, blue


__all__ = ["HEAT", "INK", "MUTED", "PAPER", "RULE", "TRUTH", "VEIL", "heat", "tint"]
