//go:build crds

// Package crds keeps modules in go.mod of which the tests use only the files: custom resource definitions.
package crds

import _ "github.com/aws/karpenter-provider-aws/pkg/apis"
