"""The first plans of a search: from the criterion's risk, from exact solutions of additive problems, from papers."""
