variable "name" {
  description = "Of everything that is made, and the beginning of the bucket's name."
  type        = string
  default     = "llada"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,20}$", var.name))
    error_message = "Two to 21 small letters, digits and hyphens, a letter first."
  }
}

variable "region" {
  description = "Where everything is: data and machines in one region, or every byte is paid for."
  type        = string
  default     = "us-east-1"
}

variable "admin_cidrs" {
  description = "Networks that may reach the API server of the cluster. No default: 0.0.0.0/0 would be everybody."
  type        = list(string)
}

variable "kubernetes_version" {
  type    = string
  default = "1.34"
}

variable "cpu_pool" {
  description = "Machines of heads, preparation and everything without a GPU: 2 are always there."
  type = object({
    instance_types = optional(list(string), ["m7i.4xlarge", "m6i.4xlarge"])
    max_size       = optional(number, 10)
  })
  default = {}
}

variable "gpu_pool" {
  description = "Machines with GPUs, on demand; none when nobody asks. A capacity block (capacity_reservation_id) is what large ones usually take."
  type = object({
    instance_types          = optional(list(string), ["p5.48xlarge"])
    max_size                = optional(number, 2)
    capacity_reservation_id = optional(string)
  })
  default = {}
}

variable "gpu_spot_pool" {
  description = "Machines with GPUs that may be taken away within two minutes, for a third to half of the price. A training saves a checkpoint and goes on."
  type = object({
    instance_types = optional(list(string), ["g6e.12xlarge", "g6.12xlarge", "g5.12xlarge"])
    max_size       = optional(number, 0)
  })
  default = {}
}

variable "keep_raw_days" {
  description = "After so many days, what lies below raw/ goes to cheaper storage; it is never deleted."
  type        = number
  default     = 60
}
