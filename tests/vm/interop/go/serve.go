package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"github.com/containerd/ttrpc/integration/streaming"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// serve answers on a unix socket until the process is ended.
func serve(path string) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	task.RegisterTTRPCTaskService(server, &tasks{})
	streaming.RegisterTTRPCStreamingService(server, streams{})
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	return server.Serve(context.Background(), listener)
}

// tasks answers containerd's task API with what it saw of the request.
type tasks struct {
	task.TTRPCTaskService
	mu      sync.Mutex
	created *task.CreateTaskRequest
}

// State says which metadata came (as stdin) and how many milliseconds are left (as pid).
func (t *tasks) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	answer := &task.StateResponse{ID: r.ID}
	if md, ok := ttrpc.GetMetadata(ctx); ok {
		namespaces, _ := md.Get("containerd-namespace-ttrpc")
		answer.Stdin = strings.Join(namespaces, ",")
	}
	if deadline, ok := ctx.Deadline(); ok {
		answer.Pid = uint32(time.Until(deadline).Milliseconds())
	}
	return answer, nil
}

func (t *tasks) Create(_ context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.created = r
	return &task.CreateTaskResponse{Pid: 1<<32 - 1}, nil
}

// Kill fails with the signal's number as its code.
func (t *tasks) Kill(_ context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	if r.Signal == 99 {
		return nil, errors.New("no status")
	}
	return &emptypb.Empty{}, status.Error(codes.Code(r.Signal), fmt.Sprintf("code %d", r.Signal))
}

func (t *tasks) Wait(ctx context.Context, _ *task.WaitRequest) (*task.WaitResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// Stats gives the last Create as JSON for the id "created", or as many bytes as the id says.
func (t *tasks) Stats(_ context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	if r.ID == "created" {
		t.mu.Lock()
		defer t.mu.Unlock()
		text, err := protojson.Marshal(t.created)
		return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: "json", Value: text}}, err
	}
	var size int
	if _, err := fmt.Sscan(r.ID, &size); err != nil {
		return nil, err
	}
	value := make([]byte, size)
	for i := range value {
		value[i] = byte(i % 251)
	}
	return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: "bytes", Value: value}}, nil
}

// streams is ttrpc's own service for trying out streams.
type streams struct{}

func (streams) Echo(_ context.Context, p *streaming.EchoPayload) (*streaming.EchoPayload, error) {
	p.Seq++
	return p, nil
}

func (streams) EchoStream(_ context.Context, s streaming.TTRPCStreaming_EchoStreamServer) error {
	for {
		p, err := s.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if p.Msg == "fail" {
			return status.Error(codes.FailedPrecondition, "asked to fail")
		}
		p.Seq++
		if err := s.Send(p); err != nil {
			return err
		}
	}
}

func (streams) SumStream(_ context.Context, s streaming.TTRPCStreaming_SumStreamServer) (*streaming.Sum, error) {
	sum := &streaming.Sum{}
	for {
		p, err := s.Recv()
		if err == io.EOF {
			return sum, nil
		}
		if err != nil {
			return nil, err
		}
		sum.Sum += p.Add
		sum.Num++
	}
}

func (streams) DivideStream(_ context.Context, r *streaming.Sum, s streaming.TTRPCStreaming_DivideStreamServer) error {
	for i := int32(0); i < r.Num; i++ {
		if err := s.Send(&streaming.Part{Add: i}); err != nil {
			return err
		}
	}
	return nil
}

func (streams) EchoNull(_ context.Context, s streaming.TTRPCStreaming_EchoNullServer) (*emptypb.Empty, error) {
	for {
		if _, err := s.Recv(); err == io.EOF {
			return &emptypb.Empty{}, nil
		} else if err != nil {
			return nil, err
		}
	}
}

func (streams) EchoNullStream(_ context.Context, s streaming.TTRPCStreaming_EchoNullStreamServer) error {
	for {
		if _, err := s.Recv(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := s.Send(&emptypb.Empty{}); err != nil {
			return err
		}
	}
}

func (streams) EmptyPayloadStream(_ context.Context, _ *emptypb.Empty, s streaming.TTRPCStreaming_EmptyPayloadStreamServer) error {
	for seq := uint32(1); seq <= 5; seq++ {
		if err := s.Send(&streaming.EchoPayload{Seq: seq}); err != nil {
			return err
		}
	}
	return nil
}
