package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"github.com/containerd/ttrpc/integration/streaming"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// call asks a server everything it can and prints {what: "" or what was wrong} as JSON.
func call(path string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	c := caller{client, task.NewTTRPCTaskClient(client), streaming.NewTTRPCStreamingClient(client)}
	results := map[string]string{}
	for _, check := range []struct {
		what string
		run  func(context.Context) error
	}{
		{"metadata", c.metadata},
		{"no metadata and no deadline", c.plain},
		{"deadline reaches the handler", c.deadline},
		{"create", c.create},
		{"codes", c.codes},
		{"unknown service", c.unknownService},
		{"unknown method", c.unknownMethod},
		{"v3", c.v3},
		{"late answer", c.late},
		{"cancelled call", c.cancelled},
		{"large answer", c.large},
		{"oversized answer", c.oversizedAnswer},
		{"concurrent calls", c.concurrent},
		{"echo stream", c.echoStream},
		{"error on a stream", c.errorStream},
		{"sum stream", c.sumStream},
		{"divide stream", c.divideStream},
		{"empty messages in", c.echoNull},
		{"empty messages out", c.echoNullStream},
		{"empty payload", c.emptyPayload},
		{"many streams at once", c.manyStreams},
		{"shutdown is answered before the connection ends", c.shutdown},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		results[check.what] = ""
		if err := check.run(ctx); err != nil {
			results[check.what] = err.Error()
		}
		cancel()
	}
	return json.NewEncoder(os.Stdout).Encode(results)
}

type caller struct {
	client  *ttrpc.Client
	tasks   task.TTRPCTaskService
	streams streaming.TTRPCStreamingClient
}

func expect(what string, got, want any) error {
	if fmt.Sprint(got) != fmt.Sprint(want) {
		return fmt.Errorf("%s is %v, not %v", what, got, want)
	}
	return nil
}

func (c caller) metadata(ctx context.Context) error {
	md := ttrpc.MD{}
	md.Set("containerd-namespace-ttrpc", "k8s.io")
	state, err := c.tasks.State(ttrpc.WithMetadata(ctx, md), &task.StateRequest{ID: "x"})
	if err != nil {
		return err
	}
	return errors.Join(expect("id", state.ID, "x"), expect("namespace", state.Stdin, "k8s.io"))
}

func (c caller) plain(context.Context) error {
	state, err := c.tasks.State(context.Background(), &task.StateRequest{ID: "x"})
	if err != nil {
		return err
	}
	return errors.Join(expect("namespace", state.Stdin, ""), expect("milliseconds left", state.Pid, 0))
}

func (c caller) deadline(context.Context) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	state, err := c.tasks.State(ctx, &task.StateRequest{ID: "x"})
	if err != nil {
		return err
	}
	if state.Pid < 50_000 || state.Pid > 60_000 {
		return fmt.Errorf("%d ms left of a minute", state.Pid)
	}
	return nil
}

func (c caller) create(ctx context.Context) error {
	request := &task.CreateTaskRequest{
		ID: "pod", Bundle: "/run/bundle", Terminal: true, Stdin: "in", Stdout: "out", Stderr: "err",
		Rootfs: []*types.Mount{
			{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b", "", "ro"}},
			{Target: "t"},
		},
		Options: &anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{0, 1, 255}},
	}
	if _, err := c.tasks.Create(ctx, request); err != nil {
		return err
	}
	stats, err := c.tasks.Stats(ctx, &task.StatsRequest{ID: "created"})
	if err != nil {
		return err
	}
	back := &task.CreateTaskRequest{}
	if err := proto.Unmarshal(stats.Stats.Value, back); err != nil {
		return err
	}
	if !proto.Equal(request, back) {
		return fmt.Errorf("%v came back as %v", request, back)
	}
	return nil
}

func (c caller) codes(ctx context.Context) error {
	for code := codes.OK; code <= codes.Unauthenticated; code++ {
		_, err := c.tasks.Kill(ctx, &task.KillRequest{Signal: uint32(code)})
		got := status.Convert(err)
		if got.Code() != code || (code != codes.OK && got.Message() != fmt.Sprintf("code %d", code)) {
			return fmt.Errorf("code %v came as %v %q", code, got.Code(), got.Message())
		}
	}
	_, err := c.tasks.Kill(ctx, &task.KillRequest{Signal: 99})
	return expect("a bug's error", status.Convert(err), status.New(codes.Unknown, "no status"))
}

func (c caller) unknownService(ctx context.Context) error {
	err := c.client.Call(ctx, "nope.Nope", "State", &task.StateRequest{}, &task.StateResponse{})
	return expect("code", status.Code(err), codes.Unimplemented)
}

func (c caller) unknownMethod(ctx context.Context) error {
	_, err := c.tasks.Checkpoint(ctx, &task.CheckpointTaskRequest{})
	return expect("code", status.Code(err), codes.Unimplemented)
}

func (c caller) v3(ctx context.Context) error {
	state, err := taskv3.NewTTRPCTaskClient(c.client).State(ctx, &taskv3.StateRequest{ID: "three"})
	if err != nil {
		return err
	}
	return expect("id", state.ID, "three")
}

func (c caller) late(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := c.tasks.Wait(ctx, &task.WaitRequest{})
	if status.Code(err) != codes.DeadlineExceeded && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("got %v", err)
	}
	return nil
}

func (c caller) cancelled(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err := c.tasks.Wait(ctx, &task.WaitRequest{})
	if !errors.Is(err, context.Canceled) {
		return fmt.Errorf("got %v", err)
	}
	return c.plain(ctx)
}

func pattern(size int) []byte {
	value := make([]byte, size)
	for i := range value {
		value[i] = byte(i % 251)
	}
	return value
}

func (c caller) large(ctx context.Context) error {
	for _, size := range []int{0, 1, 70_000, 4<<20 - 100} {
		stats, err := c.tasks.Stats(ctx, &task.StatsRequest{ID: fmt.Sprint(size)})
		if err != nil {
			return err
		}
		if !bytes.Equal(stats.Stats.Value, pattern(size)) {
			return fmt.Errorf("%d bytes came back differently", size)
		}
	}
	return nil
}

func (c caller) oversizedAnswer(ctx context.Context) error {
	_, err := c.tasks.Stats(ctx, &task.StatsRequest{ID: fmt.Sprint(4 << 20)})
	return expect("code", status.Code(err), codes.ResourceExhausted)
}

func (c caller) concurrent(ctx context.Context) error {
	errs := make(chan error, 50)
	for i := range 50 {
		go func() {
			for j := range 20 {
				id := fmt.Sprintf("%d-%d", i, j)
				state, err := c.tasks.State(ctx, &task.StateRequest{ID: id})
				if err == nil {
					err = expect("id", state.ID, id)
				}
				if err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	var all error
	for range 50 {
		all = errors.Join(all, <-errs)
	}
	return all
}

func (c caller) echo(ctx context.Context, count int) error {
	stream, err := c.streams.EchoStream(ctx)
	if err != nil {
		return err
	}
	for i := range count {
		if err := stream.Send(&streaming.EchoPayload{Seq: uint32(i), Msg: "m"}); err != nil {
			return err
		}
		back, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := expect("seq", back.Seq, i+1); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	_, err = stream.Recv()
	return expect("the end", err, io.EOF)
}

func (c caller) echoStream(ctx context.Context) error { return c.echo(ctx, 100) }

func (c caller) errorStream(ctx context.Context) error {
	stream, err := c.streams.EchoStream(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&streaming.EchoPayload{Msg: "fail"}); err != nil {
		return err
	}
	_, err = stream.Recv()
	return expect("error", status.Convert(err), status.New(codes.FailedPrecondition, "asked to fail"))
}

func (c caller) sumStream(ctx context.Context) error {
	stream, err := c.streams.SumStream(ctx)
	if err != nil {
		return err
	}
	for i := range 100 {
		if err := stream.Send(&streaming.Part{Add: int32(i)}); err != nil {
			return err
		}
	}
	sum, err := stream.CloseAndRecv()
	if err != nil {
		return err
	}
	return errors.Join(expect("sum", sum.Sum, 4950), expect("num", sum.Num, 100))
}

func (c caller) divideStream(ctx context.Context) error {
	stream, err := c.streams.DivideStream(ctx, &streaming.Sum{Num: 50})
	if err != nil {
		return err
	}
	for i := range 50 {
		part, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := expect("part", part.Add, i); err != nil {
			return err
		}
	}
	_, err = stream.Recv()
	return expect("the end", err, io.EOF)
}

func (c caller) echoNull(ctx context.Context) error {
	stream, err := c.streams.EchoNull(ctx)
	if err != nil {
		return err
	}
	for range 10 {
		if err := stream.Send(&streaming.EchoPayload{}); err != nil {
			return err
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

func (c caller) echoNullStream(ctx context.Context) error {
	stream, err := c.streams.EchoNullStream(ctx)
	if err != nil {
		return err
	}
	for range 10 {
		if err := stream.Send(&streaming.EchoPayload{}); err != nil {
			return err
		}
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	_, err = stream.Recv()
	return expect("the end", err, io.EOF)
}

func (c caller) emptyPayload(ctx context.Context) error {
	stream, err := c.streams.EmptyPayloadStream(ctx, &emptypb.Empty{})
	if err != nil {
		return err
	}
	for seq := 1; seq <= 5; seq++ {
		payload, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := expect("seq", payload.Seq, seq); err != nil {
			return err
		}
	}
	_, err = stream.Recv()
	return expect("the end", err, io.EOF)
}

func (c caller) manyStreams(ctx context.Context) error {
	errs := make([]error, 20)
	var all sync.WaitGroup
	for i := range errs {
		all.Add(1)
		go func() {
			defer all.Done()
			errs[i] = c.echo(ctx, 30)
		}()
	}
	all.Wait()
	return errors.Join(errs...)
}

// shutdown comes last: the server answers, ends a call that waits, and closes.
func (c caller) shutdown(ctx context.Context) error {
	waiting := make(chan error, 1)
	go func() {
		_, err := c.tasks.Wait(context.Background(), &task.WaitRequest{})
		waiting <- err
	}()
	if _, err := c.tasks.Shutdown(ctx, &task.ShutdownRequest{}); err != nil {
		return err
	}
	if err := <-waiting; !errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("the call that waited got %v", err)
	}
	return nil
}
