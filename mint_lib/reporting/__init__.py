"""From answers to a verdict: test material, scores, estimates, sentences, plots and the page."""
