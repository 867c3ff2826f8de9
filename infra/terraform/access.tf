# What pods may do, by the name of their service account (EKS Pod Identity): no key in any file. Each has the bucket, or the part
# of it that is its own, and nothing else.
locals {
  bucket = aws_s3_bucket.data.arn

  pods = {
    # All stages and the endpoint. They delete too: a finished preparation clears up its intermediate files.
    ray = {
      namespace       = "llada"
      service_account = "llada-ray"
      prefixes        = ["*"]
    }
    # Artifacts, which it keeps for its clients.
    mlflow = {
      namespace       = "mlflow"
      service_account = "mlflow"
      prefixes        = ["mlflow/*"]
    }
  }
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]

    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "pod" {
  for_each = toset(concat(keys(local.pods), ["ebs-csi", "cluster-autoscaler"]))

  name               = "${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy_attachment" "ebs_csi" {
  role       = aws_iam_role.pod["ebs-csi"].name
  policy_arn = "arn:aws:iam::aws:policy/service-role/AmazonEBSCSIDriverPolicy"
}

# Adds and removes machines of this cluster's pools, and of no other group.
data "aws_iam_policy_document" "cluster_autoscaler" {
  statement {
    sid = "Look"
    actions = [
      "autoscaling:DescribeAutoScalingGroups",
      "autoscaling:DescribeAutoScalingInstances",
      "autoscaling:DescribeLaunchConfigurations",
      "autoscaling:DescribeScalingActivities",
      "ec2:DescribeImages",
      "ec2:DescribeInstanceTypes",
      "ec2:DescribeLaunchTemplateVersions",
      "ec2:GetInstanceTypesFromInstanceRequirements",
      "eks:DescribeNodegroup",
    ]
    resources = ["*"]
  }

  statement {
    sid       = "Scale"
    actions   = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
    resources = ["*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.name}"
      values   = ["owned"]
    }
  }
}

resource "aws_iam_role_policy" "cluster_autoscaler" {
  name   = "machines"
  role   = aws_iam_role.pod["cluster-autoscaler"].id
  policy = data.aws_iam_policy_document.cluster_autoscaler.json
}

resource "aws_eks_pod_identity_association" "cluster_autoscaler" {
  cluster_name    = module.eks.cluster_name
  namespace       = "kube-system"
  service_account = "cluster-autoscaler"
  role_arn        = aws_iam_role.pod["cluster-autoscaler"].arn
}

data "aws_iam_policy_document" "bucket" {
  for_each = local.pods

  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [local.bucket]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = concat([""], each.value.prefixes)
    }
  }

  statement {
    sid = "Objects"
    actions = [
      "s3:GetObject",
      "s3:PutObject",
      "s3:DeleteObject",
      "s3:AbortMultipartUpload",
      "s3:ListMultipartUploadParts",
    ]
    resources = [for prefix in each.value.prefixes : "${local.bucket}/${prefix}"]
  }
}

resource "aws_iam_role_policy" "bucket" {
  for_each = local.pods

  name   = "bucket"
  role   = aws_iam_role.pod[each.key].id
  policy = data.aws_iam_policy_document.bucket[each.key].json
}

resource "aws_eks_pod_identity_association" "pod" {
  for_each = local.pods

  cluster_name    = module.eks.cluster_name
  namespace       = each.value.namespace
  service_account = each.value.service_account
  role_arn        = aws_iam_role.pod[each.key].arn
}
