module "eks" {
  source  = "terraform-aws-modules/eks/aws"
  version = "~> 21.0"

  name               = var.name
  kubernetes_version = var.kubernetes_version
  vpc_id             = module.vpc.vpc_id
  subnet_ids         = module.vpc.private_subnets

  endpoint_public_access                   = true
  endpoint_public_access_cidrs             = var.admin_cidrs
  enable_cluster_creator_admin_permissions = true
  enabled_log_types                        = ["audit", "authenticator"]

  addons = {
    coredns                = {}
    eks-pod-identity-agent = { before_compute = true }
    kube-proxy             = {}
    # The network policies of infra/kubernetes are this addon's to keep.
    vpc-cni = {
      before_compute       = true
      configuration_values = jsonencode({ enableNetworkPolicy = "true" })
    }
    aws-ebs-csi-driver = {
      pod_identity_association = [{
        role_arn        = aws_iam_role.pod["ebs-csi"].arn
        service_account = "ebs-csi-controller-sa"
      }]
    }
  }

  eks_managed_node_groups = {
    cpu = {
      ami_type       = "AL2023_x86_64_STANDARD"
      instance_types = var.cpu_pool.instance_types
      min_size       = 2
      desired_size   = 2
      max_size       = var.cpu_pool.max_size
      labels         = { "llada/pool" = "cpu" }
      # Ray's session, its spilled objects and caches.
      block_device_mappings = local.disks["cpu"]
    }

    gpu = {
      ami_type       = "AL2023_x86_64_NVIDIA"
      instance_types = var.gpu_pool.instance_types
      min_size       = 0
      desired_size   = 0
      max_size       = var.gpu_pool.max_size
      labels         = local.gpu_labels
      taints         = local.gpu_taints
      # Machines that speak to one another through EFA stand in one zone, close together.
      subnet_ids            = [module.vpc.private_subnets[0]]
      enable_efa_support    = true
      block_device_mappings = local.disks["gpu"]
      capacity_type         = var.gpu_pool.capacity_reservation_id == null ? "ON_DEMAND" : "CAPACITY_BLOCK"
      capacity_reservation_specification = var.gpu_pool.capacity_reservation_id == null ? null : {
        capacity_reservation_target = {
          capacity_reservation_id = var.gpu_pool.capacity_reservation_id
        }
      }
    }

    # EKS drains a machine at its two minutes' notice: the pod's preStop tells Ray, and the training saves a checkpoint.
    gpu-spot = {
      ami_type              = "AL2023_x86_64_NVIDIA"
      instance_types        = var.gpu_spot_pool.instance_types
      capacity_type         = "SPOT"
      min_size              = 0
      desired_size          = 0
      max_size              = var.gpu_spot_pool.max_size
      labels                = merge(local.gpu_labels, { "llada/spot" = "true" })
      taints                = local.gpu_taints
      block_device_mappings = local.disks["gpu"]
    }
  }
}

locals {
  # By the second one, NVIDIA's device plugin knows where to run.
  gpu_labels = { "llada/pool" = "gpu", "nvidia.com/gpu.present" = "true" }

  gpu_taints = {
    gpu = {
      key    = "nvidia.com/gpu"
      value  = "true"
      effect = "NO_SCHEDULE"
    }
  }

  disks = {
    for pool, gigabytes in { cpu = 200, gpu = 1000 } : pool => {
      root = {
        device_name = "/dev/xvda"
        ebs = {
          volume_size = gigabytes
          volume_type = "gp3"
          encrypted   = true
        }
      }
    }
  }
}
