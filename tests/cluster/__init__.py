"""A real control plane on this machine: kube-apiserver, Volcano and Karpenter as processes, pods as processes too."""
