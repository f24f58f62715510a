"""Figures of the heads stage by name: studies in, figure and the table behind it out."""

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from saeflow.heads import latent_figures, output_figures
from saeflow.heads.folder import HeadStudy

FIGURES: dict[str, Callable[[list[HeadStudy]], tuple[Figure, pd.DataFrame]]] = {
    "heads_norms": output_figures.norms,
    "heads_spectra": output_figures.spectra,
    "heads_cosines": output_figures.cosines,
    "heads_cross_terms": output_figures.cross_terms,
    "heads_angles": output_figures.angles,
    "heads_interference": output_figures.interference,
    "heads_shares": latent_figures.shares,
    "heads_measures": latent_figures.measures,
    "heads_decomposition": latent_figures.decomposition,
    "heads_agreement": latent_figures.agreement,
    "heads_attribution": latent_figures.attribution,
}
