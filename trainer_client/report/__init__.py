"""`python -m trainer_client.report`: how the data preferences of runs evolved, in one HTML file that opens offline.

`runs` reads the folders that `trainer_client.run` wrote, `series` makes curves of their lines, `charts` draws them with
plotly, `page` puts the file together. Nothing here trains or asks a service.
"""
