"""The colours of all pages and pictures."""

SHEET, CARD, LINE = "#faf9f5", "#ffffff", "#e4e2db"
INK, SOFT, FAINT = "#26323b", "#66737b", "#8b979f"
MODEL, DEAF, TEXT = "#1f6f78", "#c58b3b", "#9b8aa6"
TRUE, MISSED, WRONG, TICKED = "#2a7d4f", "#b0752a", "#b3402e", "#f5d00066"
