"""Compact KV by attention matching (draft)."""
from __future__ import annotations
from dataclasses import dataclass
import torch
from lloco_engine.decoder.attention import Cache
from lloco_engine.types import Segment

@dataclass
class Opt:
    max_rows:int=2048
    stride:int=1
    ridge:float=1e-3
    iters:int=200
    mass_rows:str='full'
    floor:float=1e-4
    score:str='max'

def compress(runner, p_ids, chunk_ids, repeat_ids, ratios, opt=Opt()):
    sh=runner.shape; P=len(p_ids); n=len(chunk_ids); H=sh.kv_heads; G=sh.query_heads//H; D=sh.head_dim
    dev=runner.device
    total=P+2*n+len(repeat_ids)
    cache=Cache(sh.layers,1,H,D,total,device=dev,dtype=runner.dtype)
    ids=torch.tensor([list(p_ids)+list(chunk_ids)])
    runner.forward(ids,torch.arange(P+n),cache)
    state=[]
    rep=list(repeat_ids)+list(chunk_ids)
    T=len(rep)
    rows=torch.arange(0,T,opt.stride)
    M=len(rows)*G
    fit=torch.arange(0,M, max(1,-(-M//opt.max_rows)))
    def observe(l,q):
        sc=D**-0.5
        Q=q[0].view(H,G,T,D)[:,:,rows].reshape(H,M,D)*sc
        K=cache.keys[l][0,:,:P+n];V=cache.values[l][0,:,:P+n]
        best=torch.full((H,n),-1e30);lses=[]
        for s in range(0,M,1024):
            S=Q[:,s:s+1024]@K.transpose(1,2)
            lse=torch.logsumexp(S,-1,keepdim=True); lses.append(lse)
            S-=lse
            best=torch.maximum(best,S[:,:,P:].amax(1))
        lse=torch.cat(lses,1)[:,fit]
        Qf=Q[:,fit]
        Y=[];mass=[]
        for s in range(0,Qf.shape[1],1024):
            A=torch.exp(Qf[:,s:s+1024]@K.transpose(1,2)-lse[:,s:s+1024])
            Y.append(A@V); mass.append(A[:,:,P:].sum(-1))
        state.append((best,Qf,lse,torch.cat(Y,1),torch.cat(mass,1)))
    runner.forward(torch.tensor([rep]),torch.arange(P+n,P+n+T),cache,observe=observe)
    imp=torch.stack([s[0] for s in state]) # L,H,n
    out=[]
    for ratio in ratios:
        budget=max(int(round(n/ratio*sh.layers*H)),sh.layers*H)
        flat=imp.clone()
        flat.scatter_(2,flat.argmax(-1,keepdim=True),1e9)  # at least one per head
        thr=torch.topk(flat.flatten(),min(budget,flat.numel())).indices
        keep=torch.zeros(flat.numel(),dtype=torch.bool);keep[thr]=True;keep=keep.view_as(flat)
        ks,vs,bs,lens=[],[],[],[]
        for l in range(sh.layers):
            best,Qf,lse,Y,mass=state[l]
            k=keep[l].sum(-1);km=int(k.max())
            idx=torch.argsort(~keep[l],dim=-1,stable=True)[:,:km]
            valid=torch.arange(km)[None]<k[:,None]
            Kc=cache.keys[l][0,:,P:P+n];Vc=cache.values[l][0,:,P:P+n]
            Kk=Kc.gather(1,idx[...,None].expand(-1,-1,D));Vk=Vc.gather(1,idx[...,None].expand(-1,-1,D))
            A=torch.exp(Qf@Kk.transpose(1,2)-lse)*valid[:,None]
            # mass
            Gm=A.transpose(1,2)@A; b=(A.transpose(1,2)@mass[...,None])[...,0]
            d=Gm.diagonal(dim1=1,dim2=2)
            reg=1e-4*d.sum(-1,keepdim=True)/k[:,None]+1e-12
            Gm=Gm+torch.diag_embed(reg.expand(-1,km)); b=b+reg  # towards w=1
            w=nnls(Gm,b,opt.iters)*valid
            w=w.clamp_min(opt.floor)
            # values
            Kp=cache.keys[l][0,:,:P];Vp=cache.values[l][0,:,:P]
            Ap=torch.exp(Qf@Kp.transpose(1,2)-lse)
            E=A*w[:,None]
            Z=E.sum(-1,keepdim=True)+Ap.sum(-1,keepdim=True)
            X=E/Z
            R=Y-(Ap/Z)@Vp-X@Vk
            XX=X.transpose(1,2)@X
            lam=opt.ridge*(XX.diagonal(dim1=1,dim2=2).sum(-1)/k)[:,None]+1e-9
            XX=XX+torch.diag_embed(lam.expand(-1,km)+(~valid)*1.0)
            rhs=X.transpose(1,2)@R; dV=torch.stack([torch.cholesky_solve(rhs[h],torch.linalg.cholesky(XX[h])) for h in range(H)])
            Vk=Vk+dV
            for h in range(H):
                m=int(k[h]);ks.append(Kk[h,:m]);vs.append(Vk[h,:m]);bs.append(w[h,:m].log());lens.append(m)
        out.append(Segment(torch.cat(ks),torch.cat(vs),torch.cat(bs),torch.tensor(lens).view(sh.layers,H),n))
    return out

def nnls(G,b,iters):
    # accelerated projected gradient; G (H,k,k), b (H,k)
    L=torch.linalg.matrix_norm(G,ord='fro') # upper bound of the largest eigenvalue
    v=torch.rand(G.shape[0],G.shape[1],1)
    for _ in range(15):
        v=G@v; v=v/v.norm(dim=1,keepdim=True)
    L=((v.transpose(1,2)@G@v)[:,0,0]*1.05)[:,None]
    x=torch.ones_like(b);y=x.clone();t=1.
    for _ in range(iters):
        xn=(y-((G@y[...,None])[...,0]-b)/L).clamp_min(0)
        tn=(1+(1+4*t*t)**.5)/2
        y=xn+(t-1)/tn*(xn-x);x=xn;t=tn
    return x
