data "aws_availability_zones" "available" {
  state = "available"
}

locals {
  # EKS wants two zones; a training stays in the first, where its machines are next to one another.
  zones = slice(data.aws_availability_zones.available.names, 0, 2)
}

module "vpc" {
  source  = "terraform-aws-modules/vpc/aws"
  version = "~> 6.0"

  name             = var.name
  cidr             = "10.42.0.0/16"
  azs              = local.zones
  private_subnets  = ["10.42.0.0/18", "10.42.64.0/18"]
  public_subnets   = ["10.42.128.0/24", "10.42.129.0/24"]
  database_subnets = ["10.42.130.0/24", "10.42.131.0/24"]

  enable_nat_gateway   = true
  single_nat_gateway   = true
  enable_dns_hostnames = true
}

# The way to S3 that costs nothing: through the NAT gateway, 100 TB of data would be 4,500 dollars.
resource "aws_vpc_endpoint" "s3" {
  vpc_id            = module.vpc.vpc_id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = module.vpc.private_route_table_ids
}
