"""Figures of the Jacobian stage: series are the points of a sweep over the Jacobian coefficient, 0 the baseline.

Whatever else differs between studies (layer, k, the language model or its control, where the Jacobian is taken) makes
panels or line styles; studies that differ in seeds alone, the dictionaries' or the randomised model's, are drawn as
one, their mean within the span of their intervals.
"""
