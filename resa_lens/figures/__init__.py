"""Figures of Plotly, and the self-contained page that holds them."""
