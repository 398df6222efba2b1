"""De-identification of clinical text: recognisers, surrogates, a second look, and notes to measure all of it with."""
