"""Colours and markers of all figures. Okabe and Ito's colours are safe for colour-blind readers; every series has a
marker of its own too, for print."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
