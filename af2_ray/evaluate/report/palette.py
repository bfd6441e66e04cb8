"""The colours of all pages and pictures: those of light pages, and what stands for each on a dark one."""

SHEET, CARD, LINE = "#faf9f5", "#ffffff", "#e4e2db"
INK, SOFT, FAINT = "#26323b", "#66737b", "#8b979f"
MODEL, DEAF, TEXT = "#1f6f78", "#c58b3b", "#9b8aa6"
TRUE, MISSED, WRONG, TICKED = "#2a7d4f", "#b0752a", "#b3402e", "#f5d00066"

LIGHT = {
    "paper": SHEET,
    "card": CARD,
    "line": LINE,
    "ink": INK,
    "soft": SOFT,
    "faint": FAINT,
    "accent": MODEL,
    "deaf": DEAF,
    "text": TEXT,
    "true": TRUE,
    "missed": MISSED,
    "wrong": WRONG,
    "ticked": TICKED,
}
"""Colours by the name of the variable that a page has for each."""

DARK = {
    "paper": "#14191a",
    "card": "#1d2425",
    "line": "#364042",
    "ink": "#e8e6df",
    "soft": "#a3aeb0",
    "faint": "#8b979f",
    "accent": "#5fb6bf",
    "deaf": "#d9a55c",
    "text": "#b5a5c0",
    "true": "#5fbf8c",
    "missed": "#d9a04f",
    "wrong": "#e5796a",
    "ticked": "#f5d00044",
}
