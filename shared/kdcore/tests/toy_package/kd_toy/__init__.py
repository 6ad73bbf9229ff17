"""A domain package as small as can be: linear classifiers of random points. The tests put it on sys.path."""
