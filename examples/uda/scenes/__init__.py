"""Procedural street scenes in two styles, written as small GTA5 and Cityscapes data sets.

One grammar makes every scene: a street in perspective between two rows of lots (buildings, walls,
fences, parks), with furniture, people and vehicles that occlude each other by depth. The labels are
those of the real data sets, including the ids that are not counted. At least one of every twelve
scenes features each rare class, so that a split of a dozen has all 19, yet few pixels of each.

The styles differ as a game and a dashboard camera in Europe differ:

    layout      A game shows wide North American roads, with yellow centre lines, signals on mast
                arms, towers and bungalows with gaps, palms and hills. The camera sees narrow
                streets of row houses with pitched roofs, parked cars, hedges, trams, and more
                people and bicycles.
    viewpoint   A game camera is free: wider lens, varying height and horizon, no bonnet. A
                dashboard camera is fixed: longer lens, 1.2 m high, its own bonnet below (void).
    light       A game has a blue sky, hard shadows, clear air and saturated paint. The camera has
                mostly overcast sky, soft shadows, haze and greyish paint.
    materials   Game surfaces are smooth. Real ones are worn: asphalt with patches and cracks,
                stained plaster, leaves that mottle.
    sensor      A game image has no sensor. The camera has exposure, white balance, a tone curve,
                vignetting, optical blur and noise that grows with brightness.

These numbers were set by looking at the pictures and at class frequencies, never by training.

`dataset` writes the files, and `scene` draws one picture from the plan in `plan`. The objects are
in `vehicles`, `people`, `furniture`, `buildings` and `ground` and are painted on a `canvas`;
`styles` and `camera` define how the two worlds differ.
"""

from uda.scenes.dataset import check, render

__all__ = ["check", "render"]
