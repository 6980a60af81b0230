"""An example of a task and a model of your own: how long will the translation of a phrase be?"""
