"""Streamlit pages: they read the workspace and draw with plots.py."""
