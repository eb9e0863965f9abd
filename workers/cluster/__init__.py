"""Run requests on a cluster: the connection, the pool of workers, and the Ray actor that each of them is."""
