"""Start the feature explorer: `streamlit run apps/feature_explorer.py`."""

from resa_lens.app.explorer import main

main()
