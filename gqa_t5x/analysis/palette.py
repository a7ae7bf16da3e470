"""The colours of all figures: Okabe and Ito's, told apart by the colour-blind."""

BLUE, ORANGE, PINK, GREEN = '#0072B2', '#E69F00', '#CC79A7', '#009E73'
VERMILION, SKY, BLACK = '#D55E00', '#56B4E9', '#000000'
# In the order in which lines that stand for nothing in particular take them.
LINES = (BLACK, BLUE, VERMILION, GREEN, ORANGE, PINK)
