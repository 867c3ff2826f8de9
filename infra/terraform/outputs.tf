output "cluster_name" {
  value = module.eks.cluster_name
}

output "region" {
  value = var.region
}

output "bucket" {
  value = aws_s3_bucket.data.id
}

output "database_host" {
  value = aws_db_instance.mlflow.address
}

output "database_password" {
  value     = random_password.database.result
  sensitive = true
}
