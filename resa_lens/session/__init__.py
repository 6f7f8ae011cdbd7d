"""The Python front door: `resa_lens.open` gives a lab, whose methods take and return objects.

The methods call the stages that the commands call and add nothing of their own: the same options
give the same artifact, whoever asked for it first.
"""
