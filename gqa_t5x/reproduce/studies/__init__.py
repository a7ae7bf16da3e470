"""How conversion is judged: long-trained heads, small T5s, spectra."""
