"""Plans for people: text, bars, SVG, explanations, and the golden plans of the repository."""
