"""The files that tell a cluster what to run: Serve configurations, KubeRay's objects, Ray's cluster launcher.

What is wrong in one is found here, without a cluster: Ray takes misspelt keys in silence, and KubeRay's operator refuses an
object only after Kubernetes has taken it. May import pipelines.stage.
"""
