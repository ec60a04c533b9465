"""The colours of figures, maps and pages, in one place."""

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (24, 27, 33)
MUTED: Colour = (104, 111, 122)
RULE: Colour = (222, 225, 230)
VEIL = (12, 14, 18, 165)  # over a picture, so that words on it can be read
TRUTH: Colour = (0, 150, 90)  # outlines of what is known to be there
# Anchors of the two scales of maps, evenly spaced; the diverging one is transparent at its middle when overlaid.
DIVERGING = ((5, 68, 140), (63, 142, 206), (222, 226, 230), (240, 130, 40), (176, 30, 20))
SEQUENTIAL = ((30, 14, 76), (113, 31, 129), (205, 64, 113), (248, 142, 92), (252, 236, 170))
COOL, WARM = DIVERGING[1], DIVERGING[3]
# One hue, light to dark, so that it reads in grey as well.
HEAT: tuple[Colour, Colour] = ((246, 248, 251), (24, 78, 148))
FULL_TINT = 2.0  # nats at which a word has its full colour


def tint(nats: float) -> str:
    """CSS colour behind a word: warm for evidence of the features, cool for words that they speak against."""
    red, green, blue = WARM if nats > 0 else COOL
    return f"rgba({red}, {green}, {blue}, {0.65 * min(abs(nats) / FULL_TINT, 1.0):.2f})"


def heat(share: float) -> Colour:
    """The colour of a share in [0, 1]."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(*HEAT, strict=True))
    return red, green, blue


__all__ = ["DIVERGING", "HEAT", "INK", "MUTED", "PAPER", "RULE", "SEQUENTIAL", "TRUTH", "VEIL", "heat", "tint"]
